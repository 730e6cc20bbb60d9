"""One prefill for every strategy: a cache that goes on from a shared snapshot holds what it would, had it read the
prompt itself.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache as remembered
from typing import Any

import pytest
import torch
from inference import FIRM, RECIPES, left_padded
from inference import STRATEGIES as OWN_BUDGETS
from models import image_inputs, text_inputs, tiny_llama, tiny_qwen_vl

import kvcomp
from kvcomp.core.composition import trigger_conflicts
from kvcomp.core.trigger import Trigger

ROWS = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (70, 60)])
PROMPTS = {"padded text": (tiny_llama, lambda: ROWS), "images": (tiny_qwen_vl, lambda: image_inputs(6))}
STRATEGIES = {
    name: replace(made, budget=kvcomp.Budget.parse(0.98)) if name in FIRM else made
    for name, made in OWN_BUDGETS.items()
}
DECODED = torch.tensor([7, 11, 13, 17, 19])


def _decoding(trigger: str | dict[str, int]) -> list[kvcomp.Strategy]:
    """Every recipe that can compress again while tokens are decoded, and does."""
    parsed = Trigger.parse(trigger)
    able = [made for made in STRATEGIES.values() if not trigger_conflicts(made.parts, parsed, made.turns)]
    return [
        replace(made, trigger=parsed, name=f"{made.name} {parsed}")
        for made in able
        if made.selector is not None and made.name not in FIRM
    ]


MADE = {
    made.name: made
    for made in (
        *STRATEGIES.values(),
        *(replace(made, name=f"{name} append", turns="append") for name, made in list(STRATEGIES.items())[::4]),
        *_decoding({"every": 2})[::3],
        *_decoding("over-budget")[1::3],
    )
}


@remembered
def _shared(prompt: str) -> tuple[Any, dict[str, torch.Tensor], kvcomp.Session, kvcomp.Snapshot]:
    """The model, the inputs, and what one prefill for all of these strategies left."""
    build, inputs = PROMPTS[prompt]
    model, inputs = build(), inputs()
    session = kvcomp.attach(model)
    shared = session.shared_cache(MADE.values())
    with torch.no_grad():
        model(**inputs, past_key_values=shared)
    return model, inputs, session, shared.snapshot()


def _decode(model: Any, inputs: dict[str, torch.Tensor], cache: kvcomp.CompressedCache) -> torch.Tensor:
    """The logits of a few tokens, the same for every strategy."""
    logits, batch = [], len(inputs["input_ids"])
    for count in range(1, len(DECODED) + 1):
        more = DECODED[:count].expand(batch, -1)
        whole = {
            "input_ids": torch.cat([inputs["input_ids"], more], dim=1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1),
        }
        turn = cache.next_turn(model, **inputs | whole)
        sliced = {name: turn[name][..., -1:] for name in ("input_ids", "position_ids") if name in turn}
        logits.append(model(**turn | sliced).logits[:, -1])
    return torch.stack(logits)


def _same(one: kvcomp.CompressedCache, other: kvcomp.CompressedCache) -> None:
    for mine, theirs in zip(one.compressed_layers.values(), other.compressed_layers.values(), strict=True):
        assert torch.equal(mine.indices, theirs.indices)
        torch.testing.assert_close(mine.keys, theirs.keys, atol=2e-5, rtol=0)
        torch.testing.assert_close(mine.values, theirs.values, atol=2e-5, rtol=0)
        torch.testing.assert_close(mine.counts, theirs.counts, atol=2e-5, rtol=0)
    for mine, theirs in zip(one.report().layers, other.report().layers, strict=True):
        assert (mine.slots, mine.tokens, mine.allocated_bytes) == (theirs.slots, theirs.tokens, theirs.allocated_bytes)
        assert mine.rho == pytest.approx(theirs.rho, abs=1e-5, nan_ok=True)
    assert one.report().bookkeeping_bytes == other.report().bookkeeping_bytes


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", MADE)
def test_a_shared_prefill_gives_every_strategy_what_its_own_would(name: str, prompt: str) -> None:
    model, inputs, session, snapshot = _shared(prompt)
    with torch.no_grad():
        own, taken = session.cache(MADE[name]), session.cache(MADE[name])
        taken.restore(snapshot)
        try:
            model(**inputs, past_key_values=own)
        except kvcomp.BudgetError as error:
            with pytest.raises(kvcomp.BudgetError, match=re.escape(str(error))):
                taken.finish()
            return
        taken.finish()
        _same(own, taken)
        torch.testing.assert_close(_decode(model, inputs, own), _decode(model, inputs, taken), atol=2e-5, rtol=0)
        _same(own, taken)


@pytest.mark.parametrize("name", ["flowmm", "h2o", "kvzip", "meda"])
def test_one_snapshot_serves_every_budget_and_stays_as_it_is(name: str) -> None:
    model, inputs, session, snapshot = _shared("images")
    for budget in (0.1, 0.9, 0.4, 1.0, 0.1):
        own, taken = session.cache(name, budget), session.cache(name, budget)
        with torch.no_grad():
            model(**inputs, past_key_values=own)
            taken.restore(snapshot)
            _decode(model, inputs, taken)  # the first decoded token compresses
            _decode(model, inputs, own)
        _same(own, taken)


def test_a_shared_cache_that_goes_on_by_itself_keeps_everything() -> None:
    model, inputs = tiny_llama(), text_inputs(30)
    session = kvcomp.attach(model)
    with torch.no_grad():
        shared, full = session.shared_cache(["flowmm", "kvzip"]), session.cache("full")
        for cache in (shared, full):
            model(**inputs, past_key_values=cache)
        assert torch.equal(_decode(model, inputs, shared), _decode(model, inputs, full))
    session.detach()


def test_what_a_snapshot_does_not_hold_is_named() -> None:
    model, inputs = tiny_llama(), text_inputs(30)
    session = kvcomp.attach(model)
    with torch.no_grad():
        shared = session.shared_cache(["streaming-llm"])
        model(**inputs, past_key_values=shared)
        snapshot = shared.snapshot()
        with pytest.raises(kvcomp.UnsupportedUseError, match=r"'h2o' wants to know of the prompt: .*shared_cache"):
            session.cache("h2o").restore(snapshot)
        turned = session.cache(
            "streaming-llm", merger={"use": "unrotated", "merger": {"use": "mean"}}, matcher="nearest"
        )
        with pytest.raises(kvcomp.UnsupportedUseError, match="rotary embeddings"):
            turned.restore(snapshot)
        with pytest.raises(kvcomp.UnsupportedUseError, match="reads its prompt in one forward"):
            model(input_ids=torch.tensor([[3, 4]]), past_key_values=shared)
        own = session.cache("streaming-llm", 0.5)
        model(**inputs, past_key_values=own)
        with pytest.raises(kvcomp.UnsupportedUseError, match="nothing is compressed yet"):
            session.cache("streaming-llm", 0.4).restore(own.snapshot())
    with pytest.raises(kvcomp.InputError, match="got none"):
        session.shared_cache([])
    session.detach()


def test_every_recipe_is_asked() -> None:
    assert set(RECIPES) <= set(MADE)
    assert any(made.recompresses for made in MADE.values())
