"""Whatever is composed of registered parts either runs or is refused when it is built, with a reason."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from compositions import ACCEPTED, compositions
from inference import RECIPES, generate, left_padded
from models import text_inputs, tiny_llama
from transformers import PreTrainedModel

import kvcomp

TOKENS = (40, 26)
REASONS = {  # names in quotes left out
    "cannot compress again while tokens are decoded: what it holds would be coded anew each time",
    "cannot compress again while tokens are decoded: it expects queries like those of the prompt",
    "cannot compress again while tokens are decoded: the context would have to be fed again",
    "compresses what turns: append says must stay",
    "keeps every token in the budget's bytes; it works without a selector only",
    "with `evict: true` needs a scorer and a selector",
    "must be a merger that merges",
    "must be a scorer that measures attention",
    *(f"needs {need}, which no part" for need in ("all-layers", "edges", "groups", "merging", "scores")),
}
QUANTIZED = ({"use": "quantized", "bits": 2, "group": 8, "residual": 8}, {"use": "mixed", "bits": 4, "recent": 4})
TRIGGERS: tuple[Any, ...] = ("prefill-end", "over-budget", {"every": 3})


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama()


def run(model: PreTrainedModel, strategy: kvcomp.Strategy) -> None:
    """Two turns of a padded batch, with what must hold after each."""
    rows = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in TOKENS])
    with kvcomp.compress(model, strategy) as cache:
        first = generate(model, rows, cache, 7)
        check(cache, 6)
        ids = torch.cat([first.sequences, text_inputs(5, batch=2)["input_ids"]], dim=1)
        mask = torch.cat([rows["attention_mask"], torch.ones(2, 12, dtype=torch.long)], dim=1)
        second = generate(model, {"input_ids": ids, "attention_mask": mask}, cache, 3)
        check(cache, 7 + 5 + 2)
    assert all(logits.isfinite().all() for logits in (*first.logits, *second.logits))


def run_within_reach(model: PreTrainedModel, strategy: kvcomp.Strategy) -> None:
    """Run a strategy at its budget, or at the smallest that it says it needs: for every token, or all protected."""
    try:
        run(model, strategy)
    except kvcomp.BudgetError as error:
        if error.smallest is None or not (strategy.allocator.firm or strategy.selector is None):
            raise
        run(model, kvcomp.strategy(strategy, error.smallest))


def check(cache: kvcomp.CompressedCache, more: int) -> None:
    """Slots are of tokens seen, in order; what is kept, merged and evicted are all tokens; bytes are what is held."""
    report = cache.report()
    for layer, line in zip(cache.layers, report.layers, strict=True):
        filled = layer.indices >= 0
        assert layer.keys.isfinite().all()
        assert layer.values.isfinite().all()
        assert filled.any(dim=-1).all()
        assert ((layer.indices.diff(dim=-1) > 0) | ~filled[..., 1:]).all()
        assert line.tokens == tuple(tokens + more for tokens in TOKENS)
        latest = layer.indices.amax(dim=(1, 2)) - torch.tensor(line.tokens) + 1
        assert (latest <= 0).all() if cache.strategy.recompresses else (latest == 0).all()
        total = [sum(parts) for parts in zip(line.slots, line.merged, line.evicted, strict=True)]
        assert total == pytest.approx(list(line.tokens), rel=1e-4)
    held = sum(layer.storage.nbytes() for layer in cache.layers)
    assert report.allocated_bytes + report.reserved_bytes == held
    assert 0 < report.allocated_bytes <= report.full_bytes


@pytest.mark.parametrize("number", range(ACCEPTED))
def test_an_accepted_composition_runs(model: PreTrainedModel, number: int) -> None:
    run_within_reach(model, compositions()[0][number])


def test_a_refused_composition_is_told_why() -> None:
    refused = compositions()[1]
    seen = set()
    for document, message in refused:
        for fault in message.splitlines()[1:]:
            known = {reason for reason in REASONS if reason in re.sub(r"'[^']*' ", "", fault)}
            assert len(known) == 1, (document, fault)
            seen |= known
    assert seen == REASONS


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_with_any_store_and_trigger_or_is_told_why_not(model: PreTrainedModel, recipe: str) -> None:
    for store in (None, *QUANTIZED):
        for trigger in TRIGGERS:
            for mass in (False, True):
                overrides = {"trigger": trigger, "mass_preserving": mass} | ({} if store is None else {"store": store})
                try:
                    strategy = kvcomp.strategy(recipe, 0.6, **overrides)
                except kvcomp.ConfigError as error:
                    faults = [re.sub(r"'[^']*' ", "", fault) for fault in str(error).splitlines()[1:]]
                    assert all(any(reason in fault for reason in REASONS) for fault in faults), faults
                    assert trigger != "prefill-end" or store is not None
                else:
                    run_within_reach(model, strategy)
