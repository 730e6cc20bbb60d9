"""kvcomp gives a cache to a model under the name of the installed transformers, and finds it under either."""

import ast
import inspect
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, Qwen2_5_VLForConditionalGeneration

from kvcomp.runtime.cache_argument import CACHE, NEW, OLD, given_cache

ROOT = Path(__file__).parents[3]
FOLDERS = ("kvcomp", "strategies", "adapters")


@pytest.mark.parametrize("model", [LlamaForCausalLM, Qwen2_5_VLForConditionalGeneration])
def test_the_name_is_that_of_the_models(model):
    assert {CACHE} == inspect.signature(model.forward).parameters.keys() & {NEW, OLD}


def test_a_cache_is_found_under_either_name_the_new_one_first():
    assert given_cache({NEW: 1}) == given_cache({OLD: 1}) == given_cache({OLD: 2, NEW: 1}) == 1
    assert given_cache({NEW: None, OLD: 1}) == 1
    assert given_cache({"input_ids": 1}) is None


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_call_writes_the_old_name(folder):
    """A test that calls a model by it does not see the warning, which is ignored."""
    wrong = [
        f"{file}:{node.lineno}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        if file.name != "cache_argument.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if (isinstance(node, ast.keyword) and node.arg == OLD) or (isinstance(node, ast.Constant) and node.value == OLD)
    ]
    assert wrong == []
