"""Keeping transformers from writing between kvcomp's own lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging

log: Any = logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Show errors of transformers only, and none of its progress bars, inside the block."""
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
