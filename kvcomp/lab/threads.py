"""How many threads torch computes with, for as long as an experiment runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch compute with this many threads inside the block.

    A small model gains little from a second thread, and loses much when anything else runs: the threads of one
    operation wait for the slowest (tiny models on two busy cores: 92 s with two threads, 2.3 s with one).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
