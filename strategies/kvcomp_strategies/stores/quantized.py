"""Slots in a few bits each, the most recent as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvcomp.core.types import SlotForm
from kvcomp_strategies.coding import CodedStore, Heads, Run
from kvcomp_strategies.cutting import Cut, cut_all, plain_tokens
from kvcomp_strategies.pieces import Code, Coded, Piece, Plain, held, owned
from kvcomp_strategies.quantization import CHANNELS, TOKENS

FITTED_BITS = (8, 4, 2)  # what is tried where the bytes decide, the most precise first


@held
@dataclass(frozen=True)
class Precision:
    """How a head is coded.

    Attributes:
        bits: of a code.
        keys, values: slots at the end that were left as they were by the last compression.
        held_keys, held_values: of these, how many stay so when decoding goes on.
    """

    bits: int
    keys: int
    values: int
    held_keys: int
    held_values: int


class QuantizedStore(CodedStore, use="quantized"):
    """Hold keys per channel and values per token in a few bits, and a window of recent slots as they are.

    KIVI (arXiv:2402.02750; jy-yuan/KIVI, `models/llama_kivi.py`, `quant/new_pack.py`): `group` slots of one channel of
    the keys, and `group` channels of one value, share a scale and a zero. Of the keys the last `slots mod residual`
    stay as they are, and are coded together when there are `residual` of them; of the values the last `residual` stay,
    and the oldest of these is coded with every new one. Codes are packed, `8 / bits` to a byte; scale and zero have
    the dtype of the cache. Up to 16 values are coded in one call, ahead of the step from which they are read as codes;
    `nbytes` counts these. With `rank` and `outliers` this is GEAR (arXiv:2403.05527; opengear-project/GEAR,
    `GEARLM/Simulated/compress_function.py`): the extremes of every vector are kept, and the error is corrected by a
    product of two thin matrices per head, fitted to the error after the outliers are back.

    Without `bits` the budget decides, as the share of bytes of keys and values: everything stays as it is where it
    fits; else the most bits of 8, 4 and 2 with which it fits with at most `residual` recent slots as they are; then
    as many recent slots more as there is room for. Where 2 bits fit only with a shorter window, the window is shorter.
    Less than 2 bits for every slot is refused, unless the recipe evicts (`evict: true`): then as many tokens stay as
    2 bits can hold. The bytes of a row go to its heads in proportion to their slots.

    Deviations from KIVI: a scale is rounded up and never 0, so constant groups are exact; a group may be shorter at
    the end of the prompt or of a head; a block is coded at the start of the step after it is complete, so that one
    step more sees it as it was; a prompt that comes in chunks is attended as coded by later chunks, unless
    compression is deferred; a later turn codes anew what it reads. From GEAR: outliers of values are those of one
    head and not of all heads together (so that heads do not depend on each other), the numbers in their place are the
    mean of the others, and outliers are put back last and exactly; the corrections are kept in the dtype of the cache.

    Attributes:
        bits: 1, 2, 4 or 8; by default the budget decides.
        group: numbers that share a scale and a zero.
        residual: recent slots as they are; a multiple of `group`.
        window: `"sliding"` is KIVI's rule; `"block"` codes values in blocks too, as keys, which is GEAR's buffer.
        rank: of the correction of the prompt's error; 0 for none.
        decode_rank: of the correction of each block of decoded tokens.
        outliers: share of each vector that is kept as it is, half at either end.
        evict: let a budget that is too small for every token evict.
    """

    group: int = Field(default=32, ge=1)
    residual: int = Field(default=32, ge=1)
    window: Literal["sliding", "block"] = "sliding"
    rank: int = Field(default=0, ge=0)
    decode_rank: int = Field(default=0, ge=0)
    outliers: float = Field(default=0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _whole_blocks(self) -> QuantizedStore:
        if self.residual % self.group:
            raise ValueError(f"residual must be a multiple of group, got residual={self.residual}, group={self.group}")
        return self

    def smallest(self, slots: Tensor, form: SlotForm) -> Tensor:
        """Return the bytes with the fewest bits and the shortest window; with given bits and no eviction, the bytes
        that this many slots take.
        """
        if self.bits is not None:
            return form.heads * self._nbytes(slots, *self._given(slots), self.bits, form)
        sizes = [self._nbytes(slots, plain, plain, FITTED_BITS[-1], form) for plain in (slots * 0, slots % self.group)]
        return form.heads * sizes[0].minimum(sizes[1]).minimum(slots * form.slot_bytes)

    def setting(self, slots: int, limit: int | None, form: SlotForm) -> Precision | None:
        """Return how a head of so many slots is coded."""
        if self.bits is not None:
            keys, values = (int(plain) for plain in self._given(torch.tensor(slots)))
            return Precision(self.bits, keys, values, 0, 0 if self.window == "block" else self.residual)
        if limit is None or limit >= slots * form.slot_bytes:
            return None
        return _fitted(self, slots, limit, form)

    def encode(self, heads: Heads, setting: Precision) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Return codes of the older slots, and the recent ones."""
        return (
            _split(heads.keys, setting.keys, self._code(TOKENS, setting.bits, self.rank)),
            _split(heads.values, setting.values, self._code(CHANNELS, setting.bits, self.rank)),
        )

    def settle(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs with whole blocks of keys, and values beyond the window, coded."""
        step = self.residual if self.window == "block" else 1
        keys = cut_all([self._cut(run.keys, TOKENS, run.setting, run.setting.held_keys, self.residual) for run in runs])
        values = cut_all([self._cut(run.values, CHANNELS, run.setting, run.setting.held_values, step) for run in runs])
        return [replace(run, keys=one, values=two) for run, one, two in zip(runs, keys, values, strict=True)]

    def _cut(self, pieces: tuple[Piece, ...], axis: int, how: Precision, held: int, step: int) -> Cut:
        """Return that whole steps of what is plain are coded, as long as so many tokens stay."""
        return Cut(pieces, (plain_tokens(pieces) - held) // step * step, self._code(axis, how.bits, self.decode_rank))

    def _code(self, axis: int, bits: int, rank: int) -> Code:
        return Code(bits, self.group, axis, rank, self.outliers)

    def _given(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many keys and values stay as they are with given bits."""
        block = slots % self.residual
        return block, block if self.window == "block" else slots.clamp(max=self.residual)

    def _nbytes(self, slots: Tensor, keys: Tensor, values: Tensor, bits: int, form: SlotForm) -> Tensor:
        """Return the bytes of one head, of which so many keys and values are as they are."""
        coded_keys = self._code(TOKENS, bits, self.rank).nbytes(slots - keys, form.key_dim, form.itemsize)
        coded_values = self._code(CHANNELS, bits, self.rank).nbytes(slots - values, form.value_dim, form.itemsize)
        return coded_keys + coded_values + (keys * form.key_dim + values * form.value_dim) * form.itemsize


@lru_cache(maxsize=4096)  # every layer and head of a request asks the same
def _fitted(store: QuantizedStore, slots: int, limit: int, form: SlotForm) -> Precision:
    """Return the most bits, and the longest window, with which a head fits."""
    windows = torch.arange(slots + 1)
    for bits in FITTED_BITS:
        sizes = store._nbytes(torch.tensor(slots), windows, windows, bits, form)
        fitting = (sizes <= limit).nonzero()[:, 0]
        if len(fitting) and (int(fitting[0]) <= store.residual or bits == FITTED_BITS[-1]):
            window = int(fitting[-1])
            return Precision(bits, window, window, window, window)
    window = int(sizes.argmin())
    return Precision(FITTED_BITS[-1], window, window, window, window)


def _split(numbers: Tensor, plain: int, code: Code) -> tuple[Piece, ...]:
    """Return the codes of all but the last slots, and the last as they are; `numbers` `(heads, slots, dim)`."""
    coded = max(numbers.shape[1] - plain, 0)
    pieces: tuple[Piece, ...] = (Coded.of(numbers[:, :coded], code),) if coded else ()
    return (*pieces, Plain(owned(numbers[:, coded:]))) if plain else pieces
