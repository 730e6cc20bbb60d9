"""Turns and chunks: what comes later goes on from its own positions, and the budget is of everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcomp.testing.envelope.bench import TOLERANCE, Answer, Bench, Inputs, require_same_answer
from kvcomp.testing.envelope.feature import feature
from kvcomp.testing.envelope.features.storage import require_bytes
from kvcomp.testing.failures import require_close

CHUNK = 16
FIRST = 3  # tokens of the first turn's answer


def follow_up(seed: int, inputs: Inputs, tokens: int = 6) -> Tensor:
    """Return ordinary tokens `(1, tokens)` to go on with: some of the prompt's last ones, in another order."""
    generator = torch.Generator().manual_seed(seed)
    return inputs["input_ids"][:, -4:][:, torch.randint(4, (tokens,), generator=generator)]


@feature("second-turn", quick=True)
def second_turn(bench: Bench) -> None:
    """At budget 1.0 two turns give what one uncompressed run of the whole conversation gives."""
    prompt = bench.prompt()
    with bench.compressing(1.0) as cache:
        turn = _conversation(bench, cache, prompt, seed=0)
        second = _ask(bench, cache, turn)
    require_same_answer(second, bench.stock(turn), "the second turn, and of one run")


@feature("new-media")
def new_media(bench: Bench) -> None:
    """At budget 1.0 a second turn with an image of its own gives what one uncompressed run gives."""
    prompt = bench.prompt()
    bench.family.longer(prompt, follow_up(0, prompt), media=True)
    with bench.compressing(1.0) as cache:
        turn = _conversation(bench, cache, prompt, seed=0, media=True)
        second = _ask(bench, cache, turn)
    require_same_answer(second, bench.stock(turn), "a second turn with an image, and of one run")


@feature("later-budget")
def later_budget(bench: Bench) -> None:
    """A second turn is compressed too: the budget is of all tokens seen, and so many bytes are held."""
    prompt = bench.prompt()
    with bench.compressing() as cache:
        turn = _conversation(bench, cache, prompt, seed=0)
        _ask(bench, cache, turn)
        require_bytes(bench, cache, turn["input_ids"].shape[1], "a second turn")


@feature("interleaved")
def interleaved(bench: Bench) -> None:
    """Two conversations that take turns on one model say what each says alone."""
    prompts = bench.rows()[:2]
    alone = []
    for seed, prompt in enumerate(prompts):
        with bench.compressing() as cache:
            alone.append(_ask(bench, cache, _conversation(bench, cache, prompt, seed)))
    with bench.compressing() as one, bench.compressing() as other:
        turns = [
            _conversation(bench, cache, prompt, seed)
            for seed, (cache, prompt) in enumerate(zip((one, other), prompts, strict=True))
        ]
        for cache, turn, expected in zip((one, other), turns, alone, strict=True):
            require_same_answer(_ask(bench, cache, turn), expected, "a second turn, with another conversation between")


def _conversation(bench: Bench, cache: Any, prompt: Inputs, seed: int, media: bool = False) -> Inputs:
    """Return the whole conversation after a first turn that the cache has seen, with a question to go on with."""
    first = bench.generate(prompt, cache, FIRST)
    return bench.family.longer(prompt, torch.cat([first.ids, follow_up(seed, prompt)], dim=1), media)


def _ask(bench: Bench, cache: Any, turn: Inputs) -> Answer:
    return bench.generate(bench.engine.next_turn(cache, bench.model, turn))


@feature("chunks")
def chunks(bench: Bench) -> None:
    """A prompt in chunks holds the bytes of its budget, not those of its later chunks."""
    prompt = bench.prompt(media=False)
    with bench.compressing() as cache:
        bench.generate(prompt, cache, prefill_chunk_size=CHUNK)
        require_bytes(bench, cache, prompt["input_ids"].shape[1], f"a prompt in chunks of {CHUNK}")


@feature("deferred-chunks")
def deferred_chunks(bench: Bench) -> None:
    """A prompt in chunks whose compression is deferred gives what it gives in one piece."""
    prompt = bench.prompt(media=False)
    with bench.compressing(defer=True) as cache:
        chunked = bench.generate(prompt, cache, prefill_chunk_size=CHUNK)
    require_same_answer(chunked, bench.answer(prompt), "a prompt in deferred chunks, and in one piece")


@feature("long-query")
def long_query(bench: Bench) -> None:
    """A question that is fed at once to a compressed cache gives what it gives token by token."""
    prompt = bench.prompt(media=False)
    question = follow_up(0, prompt)
    with bench.prefilled(prompt, turns="append") as cache:
        at_once = bench.feed(cache, question)
    with bench.prefilled(prompt, turns="append") as cache:
        for token in torch.split(question, 1, dim=1):
            one_by_one = bench.feed(cache, token)
    require_close(at_once, one_by_one, TOLERANCE, "logits of a question at once, and token by token")


@feature("many-questions", quick=True)
def many_questions(bench: Bench) -> None:
    """Many questions against one compressed context give what each gives as the first."""
    prompt = bench.prompt()
    turns = [bench.family.longer(prompt, follow_up(seed, prompt)) for seed in range(3)]
    with bench.prefilled(prompt) as cache:
        context = bench.engine.snapshot(cache)
        answers = []
        for turn in turns:
            answers.append(_ask(bench, cache, turn))
            bench.engine.restore(cache, context)
    for place, (turn, seen) in enumerate(zip(turns, answers, strict=True)):
        with bench.prefilled(prompt) as cache:
            require_same_answer(seen, _ask(bench, cache, turn), f"question {place}, after others and as the first")
