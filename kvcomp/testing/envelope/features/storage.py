"""What is stored: the bytes of the budget, ragged heads, files, and what is dropped while tokens are decoded."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from kvcomp.testing.envelope.bench import NEW, Bench, require_same_answer
from kvcomp.testing.envelope.engine import NotClaimedError
from kvcomp.testing.envelope.feature import feature
from kvcomp.testing.failures import require

SLACK = 0.02  # of the request
EVERY = 4  # decoded tokens between two compressions


def require_bytes(bench: Bench, cache: Any, tokens: int, seen: str, decoded: int = NEW - 1, floor: bool = True) -> None:
    """Raise unless a cache holds the bytes of its budget, within 2 % and the slots that rounding down leaves away.

    Args:
        bench: says what is kept.
        cache: of the engine.
        tokens: that the budget is of.
        seen: what it is the cache of, for the message.
        decoded: tokens that may have been added since.
        floor: whether so much must be held, too.
    """
    one = bench.token_bytes
    most = bench.ratio * tokens * one
    held = bench.engine.kept_bytes(cache)
    limit = most * (1 + SLACK) + decoded * one
    require(held <= limit, f"{seen} of {tokens} tokens may hold {limit:.0f} bytes at {bench.ratio:g}, got {held}")
    least = most * (1 - SLACK) - one
    require(not floor or held >= least, f"{seen} of {tokens} tokens must hold {least:.0f} bytes, got {held}")


@feature("bytes", quick=True)
def kept_bytes(bench: Bench) -> None:
    """The storages hold the bytes that were asked for a prompt, within 2 %."""
    prompt = bench.prompt()
    with bench.prefilled(prompt) as cache:
        require_bytes(bench, cache, prompt["input_ids"].shape[1], "a prompt", decoded=0)


@feature("padded-bytes")
def padded_bytes(bench: Bench) -> None:
    """The pads of a batch take no bytes: its storages hold no more than was asked for the tokens of its rows."""
    rows = bench.rows()[:2]
    tokens = sum(int(row["attention_mask"].sum()) for row in rows)
    with bench.prefilled(bench.padded(rows)) as cache:
        require_bytes(bench, cache, tokens, "a padded batch", decoded=0, floor=False)


@feature("ragged-heads")
def ragged_heads(bench: Bench) -> None:
    """Heads that keep different numbers take their own bytes in ragged storage, and answer as in padded storage."""
    prompt = bench.prompt()
    with bench.compressing(store="ragged") as cache:
        ragged = bench.generate(prompt, cache)
        require_bytes(bench, cache, prompt["input_ids"].shape[1], "ragged storage")
    with bench.compressing(store="dense") as cache:
        require_same_answer(ragged, bench.generate(prompt, cache), "ragged and of padded storage")


@feature("save-and-load")
def save_and_load(bench: Bench) -> None:
    """A cache that was saved and loaded goes on as the one that was not."""
    prompt = bench.prompt()
    turn = bench.family.longer(prompt, prompt["input_ids"][:, -3:])
    with bench.prefilled(prompt) as cache, tempfile.TemporaryDirectory() as folder:
        bench.engine.save(cache, Path(folder) / "cache")
        loaded = bench.engine.load(Path(folder) / "cache", bench.model)
        answers = [bench.generate(bench.engine.next_turn(one, bench.model, turn)) for one in (cache, loaded)]
    require_same_answer(answers[1], answers[0], "a cache that was loaded, and of the one that was saved")


def _needs_to_drop(bench: Bench) -> None:
    """Raise where the method holds everything at the smallest budget of so short a prompt."""
    if bench.ratio == 1:
        raise NotClaimedError("the smallest budget of so short a prompt is everything")


@feature("every-n-tokens")
def every_n_tokens(bench: Bench) -> None:
    """With `trigger: {every: 4}` a long answer stays within the budget of everything seen, and 4 tokens."""
    prompt, new = bench.prompt(media=False), 3 * EVERY + 2
    with bench.compressing(trigger={"every": EVERY}) as cache:
        _needs_to_drop(bench)
        bench.generate(prompt, cache, new)
        tokens = prompt["input_ids"].shape[1] + new - 1
        require_bytes(bench, cache, tokens, "a long answer", decoded=EVERY, floor=False)


@feature("over-budget")
def over_budget(bench: Bench) -> None:
    """With `trigger: over-budget` a long answer takes no more than the budget of the prompt."""
    prompt = bench.prompt(media=False)
    with bench.compressing(trigger="over-budget") as cache:
        _needs_to_drop(bench)
        bench.generate(prompt, cache, 3 * EVERY)
        require_bytes(bench, cache, prompt["input_ids"].shape[1], "a long answer", decoded=0, floor=False)


@feature("reset")
def reset(bench: Bench) -> None:
    """A cache that is reset is a new one."""
    long, short, _ = bench.rows()
    with bench.compressing() as cache, torch.no_grad():
        bench.generate(long, cache)
        cache.reset()
        again = bench.generate(short, cache)
    require_same_answer(again, bench.answer(short), "a cache after reset(), and of a new one")
