"""The kept indices of every recipe, exactly as the naive oracles found them (`kept.json`, see `rewrite.py`)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

import kvcomp
from kvcomp.core.registry import registry
from kvcomp.testing import Run, Sample, run


def _rewrite() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_rewrite", Path(__file__).with_name("rewrite.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rewrite = _rewrite()
GOLDEN = json.loads(rewrite.FILE.read_text(encoding="utf-8"))
CASES = [(recipe, budget) for recipe, budgets in GOLDEN.items() for budget in budgets]


def batch() -> Sample:
    """The prompts of `rewrite.py` as one batch, the shorter padded on the left with large numbers."""
    width = max(rewrite.LENGTHS)
    rows = [rewrite.prompt(row) for row in range(len(rewrite.LENGTHS))]
    pads = [width - length for length in rewrite.LENGTHS]
    queries, keys, values = (
        torch.stack(
            [
                torch.nn.functional.pad(row[part], (0, 0, pad, 0), value=50.0)
                for row, pad in zip(rows, pads, strict=True)
            ]
        )
        for part in range(3)
    )
    shape = (len(rows), rewrite.KV_HEADS, width)
    modality = torch.stack([torch.tensor([0] * pad + row[3]) for row, pad in zip(rows, pads, strict=True)])
    valid = torch.arange(width) >= torch.tensor(pads)[:, None]
    indices = (valid.cumsum(dim=-1) - 1).masked_fill(~valid, -1).int()
    fields = (modality.to(torch.int8), valid, indices)
    expanded = [field[:, None].expand(shape) for field in fields]
    return Sample(queries, keys, values, *expanded, torch.ones(shape), layer=rewrite.LAYER, output=rewrite.output())


@pytest.mark.parametrize(("recipe", "budget"), CASES)
def test_kept_indices_and_edges(recipe: str, budget: str) -> None:
    seen = run(kvcomp.strategy(recipe, float(budget)), batch())
    for row, heads in enumerate(GOLDEN[recipe][budget]):
        for head, expected in enumerate(heads):
            kept = [index for index in seen.compressed.indices[row, head].tolist() if index >= 0]
            assert kept == expected["kept"], (row, head)
            if "edges" in expected:
                assert edges(seen, row, head) == expected["edges"], (row, head)


def edges(seen: Run, row: int, head: int) -> list[list[int]]:
    """Pairs of logical indices: which token is merged into which pivot."""
    index, pivots = seen.view.indices[row, head], seen.pivots.indices[row, head]
    found = (seen.edges()[row, head] > 0).nonzero().tolist()
    return [[int(index[token]), int(index[pivots[slot]])] for token, slot in found]


def test_the_file_is_what_the_oracles_say() -> None:
    assert rewrite.FILE.read_text(encoding="utf-8") == rewrite.dumped(rewrite.expected())


def test_every_built_in_recipe_is_in_the_file() -> None:
    built_in = {entry.name for entry in registry.entries("recipe") if entry.package == "kvcomp"}
    made = {name: kvcomp.strategy(name) for name in built_in}
    keeping = {name for name in built_in if made[name].selector is None}  # the indices of all are full's
    firm = {name for name in built_in if made[name].allocator.firm}  # refuse a layer by itself, see test_fastv.py
    assert built_in - keeping - firm | {"full"} == set(GOLDEN)


def test_the_prompt_has_layers_that_cross_and_gates_that_lock() -> None:
    """Or the variants of FlowMM would all be the same, and prove nothing."""
    kinds = ("flowmm", "flowmm-misaligned", "flowmm-no-gate")
    assert len({json.dumps(GOLDEN[recipe]["0.2"]) for recipe in kinds}) == len(kinds)
