"""Flash attention without a GPU: transformers finds the stand-in for `flash_attn`, and takes a CPU for its device."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from transformers import modeling_flash_attention_utils as utils

STANDINS = Path(__file__).parent / "standins"


def install_flash(patch: pytest.MonkeyPatch) -> list[str]:
    """Make `set_attn_implementation("flash_attention_2")` work until the patch is undone; return what is called."""
    patch.syspath_prepend(STANDINS)
    for name in ("flash_attn", "flash_attn.bert_padding"):
        patch.setitem(sys.modules, name, importlib.import_module(name))
    version = utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    here = {"general_availability_check": lambda: True, "supported_devices": ((lambda: True, "cpu"),)}
    patch.setitem(utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX, 2, version | here)
    patch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    patch.setattr(utils, "_loaded_implementation", None)  # load it anew, now and after the patch
    calls: list[str] = sys.modules["flash_attn"].calls
    calls.clear()
    return calls
