"""One batch of prompts, answered under one strategy, and what the cache held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from kvcomp.core.strategy import Strategy
from kvcomp.lab.batches import Batch, QueryMode
from kvcomp.runtime.cache import CompressedCache
from kvcomp.runtime.report import Report
from kvcomp.runtime.session import compress
from kvcomp.runtime.snapshots import Snapshot


@dataclass(frozen=True, eq=False)
class Held:
    """What a cache held once prompt or context was compressed, and before anything else was fed.

    Bytes are read then, and not after the last token, because a row that stops early is fed padding until the longest
    answer of its batch has ended.

    Attributes:
        report: bytes and slots.
        indices: of each compressed layer, the position of each slot `(batch, kv_heads, slots)`, -1 where empty.
        counts: of each compressed layer, how many tokens each slot stands for `(batch, kv_heads, slots)`.
    """

    report: Report
    indices: tuple[Tensor, ...]
    counts: tuple[Tensor, ...]

    @classmethod
    def by(cls, cache: CompressedCache) -> Held:
        """Return what a cache holds now."""
        tables = [layer.all_slots() for layer in cache.compressed_layers.values()]
        filled = [table for table in tables if table is not None]
        return cls(cache.report(), tuple(table.indices for table in filled), tuple(table.counts for table in filled))


@dataclass(frozen=True, eq=False)
class Answers:
    """What a batch gave.

    Attributes:
        predictions: one per row.
        held: see `Held`.
        logits: what predicts the tokens of the reference answers, those before them given,
            `(batch, tokens, vocabulary)`; None where it was not asked for.
    """

    predictions: tuple[str, ...]
    held: Held
    logits: Tensor | None = None


class _AtFirstToken(StoppingCriteria):
    """Never stops; looks once, at the first token, before anything generated is fed back."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look
        self.pending = True

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if self.pending:
            self.look()
            self.pending = False
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Request:
    """The answers of one batch in the making."""

    def __init__(self, batch: Batch, cache: CompressedCache) -> None:
        self.batch, self.cache, self.model = batch, cache, batch.bed.model
        self.held: Held | None = None
        self.before: Snapshot | None = None  # the cache at the first token

    def read_context(self) -> dict[str, Any]:
        """Compress the context by itself, and return the arguments for the question."""
        self.model.generate(**self.batch.context, past_key_values=self.cache, max_new_tokens=1, do_sample=False)
        self.held = Held.by(self.cache)
        return self.cache.next_turn(self.model, **self.batch.inputs)

    def generate(self, arguments: dict[str, Any], max_new_tokens: int) -> Any:
        """Return the output of greedy generation, at least one token, with the logits of each new one."""
        return self.model.generate(
            **arguments,
            min_new_tokens=1,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([_AtFirstToken(self._look)]),
        )

    def force(self, first: Tensor) -> Tensor:
        """Return the logits that predict the reference answers, `(batch, tokens, vocabulary)`.

        Args:
            first: what predicts their first tokens, `(batch, vocabulary)`.
        """
        assert self.before is not None
        self.cache.restore(self.before)
        seen, mask = self.cache.get_seq_length(), self.batch.answered["attention_mask"]
        arguments = self.batch.text_positions(mask) | self.cache.next_turn(self.model, **self.batch.answered)
        sliced = {name: arguments[name][..., seen:] for name in ("input_ids", "position_ids")}
        output = self.model(**arguments | sliced, use_cache=True)
        return torch.cat([first[:, None], output.logits[:, :-1]], dim=1)

    def _look(self) -> None:
        self.held = self.held or Held.by(self.cache)
        self.before = self.cache.snapshot()


def answer(
    batch: Batch,
    strategy: Strategy,
    *,
    mode: QueryMode = QueryMode.question_seen,
    max_new_tokens: int = 16,
    forced: bool = False,
) -> Answers:
    """Return the greedy answers to a batch.

    Args:
        batch: what is asked, made for the same mode.
        strategy: how the cache is compressed.
        mode: what is compressed; with `question_later` the strategy's `turns` must be `append`.
        max_new_tokens: length of an answer at most.
        forced: also compute the logits that predict the reference answers under the compressed cache, as it is before
            the first token of the answer is fed.

    Raises:
        KVCompError: the strategy cannot serve this model or this budget.
    """
    with torch.inference_mode(), compress(batch.bed.model, strategy) as cache:
        request = _Request(batch, cache)
        if mode is QueryMode.question_later:
            arguments = request.read_context()
        else:
            arguments = batch.inputs | {"past_key_values": cache}
        output = request.generate(arguments, max_new_tokens)
        logits = request.force(output.logits[0]) if forced else None
    assert request.held is not None
    new = output.sequences[:, batch.inputs["input_ids"].shape[1] :]
    return Answers(tuple(batch.bed.codec.decode(new)), request.held, logits)
