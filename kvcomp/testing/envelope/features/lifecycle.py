"""What is left behind, who else is there, and what is refused in time."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from kvcomp.testing.envelope.bench import Answer, Bench, require_same_answer
from kvcomp.testing.envelope.feature import feature
from kvcomp.testing.failures import fail, require

LOOKED_UP = {"prompt_lookup_num_tokens": 3}


def state_of(model: Any) -> dict[str, Any]:
    """Return what a library could leave on a model: names of modules and attributes, hooks, attention kernels."""
    return {
        name: (
            type(module).__name__,
            sorted(vars(module)),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            module.__dict__.get("forward"),
            str(getattr(getattr(module, "config", None), "_attn_implementation", None)),
        )
        for name, module in model.named_modules()
    }


@feature("model-restored", quick=True)
def model_restored(bench: Bench) -> None:
    """After the block, left normally or by an exception, the model is what a stock `generate()` leaves."""
    stock, mine = (replace(bench, model=bench.family.model()) for _ in range(2))
    prompt = bench.prompt()
    stock.stock(prompt)
    mine.answer(prompt)
    _require_state(mine.model, stock.model, "after the block")
    handle = mine.model.get_input_embeddings().register_forward_hook(_interrupt)
    try:
        mine.answer(prompt)
    except KeyboardInterrupt:
        handle.remove()
        _require_state(mine.model, stock.model, "after an exception inside generate()")
    else:
        fail("an exception inside generate() must reach the caller")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _require_state(model: Any, stock: Any, when: str) -> None:
    seen, expected = state_of(model), state_of(stock)
    changed = [name or "the model" for name in seen.keys() | expected.keys() if seen.get(name) != expected.get(name)]
    require(not changed, f"{when} these modules must be what stock generate() leaves: {', '.join(sorted(changed)[:4])}")


@feature("threads")
def threads(bench: Bench) -> None:
    """Two requests in threads on one model say what each says alone."""
    prompts = bench.rows()[:2]
    together: dict[int, Answer] = {}
    with bench.engine.serving(bench.model, bench.ratio) as cache:
        alone = [bench.generate(prompt, cache()) for prompt in prompts]

        def request(place: int) -> None:
            together[place] = bench.generate(prompts[place], cache())

        workers = [threading.Thread(target=request, args=(place,)) for place in range(len(prompts))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    for place, expected in enumerate(alone):
        require(place in together, f"request {place} in a thread must not fail")
        require_same_answer(together[place], expected, f"request {place} in a thread, and alone")


class Counter(LogitsProcessor):  # type: ignore[misc]
    """Counts how often a token was chosen."""

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Count, and change nothing."""
        self.tokens += 1
        return scores


@feature("assisted")
def assisted(bench: Bench) -> None:
    """Assisted decoding gives the greedy tokens, or is refused before a token is generated."""
    prompt = bench.prompt(media=False)
    counter = Counter()
    settings: Mapping[str, Any] = {"logits_processor": LogitsProcessorList([counter]), **LOOKED_UP}
    try:
        drafted = bench.answer(prompt, **settings)
    except bench.engine.refusals:
        require(counter.tokens == 0, f"must be refused before a token is generated, and {counter.tokens} were")
        return
    require(torch.equal(drafted.ids, bench.answer(prompt).ids), "assisted tokens must be the greedy ones")
