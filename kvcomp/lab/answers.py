"""A batch of prompts, answered under one strategy, or read once and answered under many; and what the cache held."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from kvcomp.core.strategy import Strategy
from kvcomp.lab.batches import Batch, QueryMode, continued
from kvcomp.runtime.cache import CompressedCache
from kvcomp.runtime.cache_argument import CACHE
from kvcomp.runtime.report import Report
from kvcomp.runtime.session import Session, compress
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
        lengths: tokens of each, up to the one that ends it.
        held: see `Held`.
        compress_seconds: time to compress the whole batch.
        decode_seconds: mean time of a step that decodes one token of every row; None for answers of one token.
        logits: what predicts the tokens of the reference answers, those before them given,
            `(batch, tokens, vocabulary)`; None where it was not asked for.
    """

    predictions: tuple[str, ...]
    lengths: tuple[int, ...]
    held: Held
    compress_seconds: float
    decode_seconds: float | None = None
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
        self.started = 0.0  # when the first token was there
        self.decode_seconds: float | None = None

    def read_context(self) -> dict[str, Any]:
        """Compress the context by itself, and return the arguments for the question."""
        self.model.generate(**self.batch.context, **{CACHE: self.cache}, max_new_tokens=1, do_sample=False)
        self.held = Held.by(self.cache)
        return self.cache.next_turn(self.model, **self.batch.inputs)

    def generate(self, arguments: dict[str, Any], max_new_tokens: int, min_new_tokens: int = 1) -> Any:
        """Return the output of greedy generation with the logits of each new token."""
        output = self.model.generate(
            **arguments,
            min_new_tokens=min_new_tokens,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([_AtFirstToken(self._look)]),
        )
        if len(output.logits) > 1:
            self.decode_seconds = (time.perf_counter() - self.started) / (len(output.logits) - 1)
        return output

    def answers(self, new: Tensor, logits: Tensor | None) -> Answers:
        """Return the answers, given the new tokens `(batch, tokens)`."""
        assert self.held is not None
        return Answers(
            predictions=tuple(self.batch.bed.codec.decode(new)),
            lengths=tuple(_length(row, self.batch.bed.stop_ids) for row in new.tolist()),
            held=self.held,
            compress_seconds=self.held.report.seconds,
            decode_seconds=self.decode_seconds,
            logits=logits,
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

    def look(self) -> None:
        """Remember the cache as it is before anything generated is fed."""
        self.held = self.held or Held.by(self.cache)
        self.before = self.cache.snapshot()

    def _look(self) -> None:
        if self.before is None:
            self.look()
        self.started = time.perf_counter()


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
        arguments = request.read_context() if mode is QueryMode.question_later else batch.inputs | {CACHE: cache}
        output = request.generate(arguments, max_new_tokens)
        logits = request.force(output.logits[0]) if forced else None
    return request.answers(output.sequences[:, batch.inputs["input_ids"].shape[1] :], logits)


class SharedPrompt:
    """A batch whose prompts, or contexts, are read once, to be answered under any number of strategies.

    Each gets the answers that `answer` gives it. A prefill does not depend on the strategy, and neither does the first
    token where the question was seen.

    Args:
        session: of the model.
        batch: what is asked, made for the same mode.
        strategies: all that will be asked for; with `question_later` their `turns` must be `append`.
        mode: what is compressed.
        max_new_tokens: length of an answer at most.
        forced: see `answer`.

    Raises:
        KVCompError: one of the strategies cannot be served from this model's prefill.
    """

    def __init__(
        self,
        session: Session,
        batch: Batch,
        strategies: Sequence[Strategy],
        *,
        mode: QueryMode = QueryMode.question_seen,
        max_new_tokens: int = 16,
        forced: bool = False,
    ) -> None:
        self.session, self.batch, self.mode = session, batch, mode
        self.max_new_tokens, self.forced = max_new_tokens, forced
        shared = session.shared_cache(strategies)
        with torch.inference_mode():
            output = batch.bed.model.generate(
                **batch.context,
                **{CACHE: shared},
                min_new_tokens=1,
                max_new_tokens=1,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        self.read = shared.snapshot()
        self.first = output.sequences[:, -1:]  # (batch, 1)
        self.logits: Tensor = output.logits[0]  # (batch, vocabulary)

    def answer(self, strategy: Strategy) -> Answers:
        """Return the greedy answers under a strategy.

        Raises:
            KVCompError: the strategy cannot serve this budget.
        """
        with torch.inference_mode():
            request = _Request(self.batch, self.session.cache(strategy))
            request.cache.restore(self.read)
            request.cache.finish()
            return self._after_question(request) if self.mode is QueryMode.question_seen else self._later(request)

    def _after_question(self, request: _Request) -> Answers:
        request.look()
        new = self.first
        if self.max_new_tokens > 1:
            inputs = continued(self.batch.inputs, new)
            arguments = request.cache.next_turn(request.model, **inputs)
            output = request.generate(arguments, self.max_new_tokens - 1, min_new_tokens=0)
            new = torch.cat([new, output.sequences[:, inputs["input_ids"].shape[1] :]], dim=1)
        return request.answers(new, request.force(self.logits) if self.forced else None)

    def _later(self, request: _Request) -> Answers:
        request.held = Held.by(request.cache)
        arguments = request.cache.next_turn(request.model, **self.batch.inputs)
        output = request.generate(arguments, self.max_new_tokens)
        logits = request.force(output.logits[0]) if self.forced else None
        return request.answers(output.sequences[:, self.batch.inputs["input_ids"].shape[1] :], logits)


def _length(ids: Sequence[int], stop_ids: Sequence[int]) -> int:
    """Return how many tokens there are up to the first that ends an answer, that one included.

    >>> _length([5, 6, 2, 0], [2]), _length([5, 6], [2])
    (3, 2)
    """
    ends = [place + 1 for place, token in enumerate(ids) if token in stop_ids]
    return min(ends, default=len(ids))
