"""One batch of prompts, answered under one strategy, and what the cache held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from kvcomp.core.strategy import Strategy
from kvcomp.lab.testbed import LoadedTestbed
from kvcomp.runtime.cache import CompressedCache
from kvcomp.runtime.report import Report
from kvcomp.runtime.session import compress


@dataclass(frozen=True)
class Answers:
    """What a batch gave: one prediction per row, and the cache's report when it held the compressed prompt and no more.

    Bytes are read then, and not after the last token, because a row that stops early is fed padding until the longest
    answer of its batch has ended.
    """

    predictions: tuple[str, ...]
    report: Report


class _Witness(StoppingCriteria):
    """Never stops; keeps the cache's report at the first token, before anything generated is fed back."""

    def __init__(self, cache: CompressedCache) -> None:
        self.cache = cache
        self.report: Report | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.report = self.report or self.cache.report()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def answer(bed: LoadedTestbed, inputs: Mapping[str, Tensor], strategy: Strategy, max_new_tokens: int = 16) -> Answers:
    """Return the greedy answers to a batch of encoded prompts.

    Raises:
        KVCompError: the strategy cannot serve this model or this budget.
    """
    with torch.inference_mode(), compress(bed.model, strategy) as cache:
        witness = _Witness(cache)
        output = bed.model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([witness]),
        )
    assert witness.report is not None
    return Answers(tuple(bed.decode(output[:, inputs["input_ids"].shape[1] :])), witness.report)
