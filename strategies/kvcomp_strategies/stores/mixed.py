"""Important slots precisely, the others in a few bits: nothing is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from typing import Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Observation
from kvcomp.core.types import Guide, SlotForm
from kvcomp_strategies.coding import CodedStore, Heads, Run
from kvcomp_strategies.cutting import Cut, cut_all, plain_tokens
from kvcomp_strategies.observations.query_peaks import QueryPeaks
from kvcomp_strategies.pieces import Code, Coded, Piece, Plain, Tiered, held, high_first, owned, packed_tier
from kvcomp_strategies.quantization import CHANNELS
from kvcomp_strategies.windows import share_of

FITTED_BITS = (4, 2)  # of what is not important, where the bytes decide
BALANCE_BYTES = 4  # of one channel's factor, float32


@held
@dataclass(frozen=True)
class Mix:
    """How a head is coded: `high` slots precisely, the others in `bits`."""

    bits: int
    high: int


class MixedStore(CodedStore, use="mixed"):
    """Hold the slots with the best scores precisely and the others in a few bits per token.

    MiKV (arXiv:2402.18096; no official code was found): instead of evicting the tokens that H2O would, hold them in
    `bits` of asymmetric rounding, in groups of `group` channels of one token. Keys are multiplied by a channel balancer
    before that and divided by it when they are read, which is the paper's division of the queries:
    `b = sqrt(max |q| / max |k|)` per head and channel, over the prompt; the query heads that share a KV head give their
    largest. Decoded tokens stay as they are until there are more than `recent`; then the oldest is coded.

    Without `bits` the budget decides, as the share of bytes: 4 bits where they leave room for `important` of the slots
    to be held precisely, else 2; then as many slots precisely as there is room for. Less is refused, unless the recipe
    evicts (`evict: true`). With `bits`, `important` of the slots are precise.

    Deviations: a later compression balances by its own queries; where no queries were seen, nothing is
    balanced. Which decoded tokens are important is not looked at. The paper's INT3 does not divide a byte.

    Attributes:
        bits: of what is not important: 1, 2, 4 or 8; by default the budget decides.
        important: share of the slots that is held precisely.
        important_bits: 8 to hold these in 8 bits; by default as they came.
        group: channels of a token that share a scale and a zero.
        recent: decoded tokens that stay as they are.
        evict: let a budget that is too small for every token evict.
    """

    requires = frozenset({"scores"})

    important: float = Field(default=0.2, ge=0.0, le=1.0)
    important_bits: Literal[8] | None = None
    group: int = Field(default=32, ge=1)
    recent: int = Field(default=32, ge=1)

    def observations(self) -> tuple[Observation, ...]:
        """Return the peaks of the queries."""
        return (QueryPeaks(),)

    def smallest(self, slots: Tensor, form: SlotForm) -> Tensor:
        """Return the bytes with 2 bits and nothing precise; with given bits, the bytes that this many slots take."""
        if self.bits is not None:
            return form.heads * self._nbytes(slots, share_of(slots, self.important), self.bits, form)
        return form.heads * self._nbytes(slots, slots * 0, FITTED_BITS[-1], form).minimum(slots * form.slot_bytes)

    def setting(self, slots: int, limit: int | None, form: SlotForm) -> Mix | None:
        """Return how a head of so many slots is coded."""
        if self.bits is not None:
            return Mix(self.bits, int(share_of(torch.tensor(slots), self.important)))
        if limit is None or limit >= slots * form.slot_bytes:
            return None
        return _fitted(self, slots, limit, form)

    def extras(self, guide: Guide) -> Tensor:
        """Return the peaks of the queries of each KV head, `(batch, kv_heads, head_dim)`."""
        kv_heads = guide.importance.shape[1]
        return rearrange(guide.observations[QueryPeaks()], "b (kv group) d -> b kv group d", kv=kv_heads).amax(dim=2)

    def encode(self, heads: Heads, setting: Mix) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Return the two kinds of slots as one piece of keys and one of values."""
        high = min(setting.high, heads.keys.shape[1])
        tier = _best(heads, high)
        balance = None if heads.extra is None else balancer(heads.extra, heads.keys)
        keys = self._tiered(heads.keys, tier, high, partial(self._low, setting.bits, balance))
        values = self._tiered(heads.values, tier, high, partial(self._low, setting.bits, None))
        if isinstance(keys, Tiered) and isinstance(values, Tiered):
            values = replace(values, tier=keys.tier)
        return (keys,), (values,)

    def settle(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs with what is no longer recent coded; a run that is plain throughout is as it came."""
        keys = cut_all([self._cut(run, run.keys, _balance(run.keys[0])) for run in runs])
        values = cut_all([self._cut(run, run.values, None) for run in runs])
        return [replace(run, keys=one, values=two) for run, one, two in zip(runs, keys, values, strict=True)]

    def _cut(self, run: Run, pieces: tuple[Piece, ...], balance: Tensor | None) -> Cut:
        old = plain_tokens(pieces) - self.recent if len(pieces) > 1 else 0
        return Cut(pieces, old, Code(run.setting.bits, self.group, CHANNELS), balance)

    def _tiered(self, numbers: Tensor, tier: Tensor, high: int, low: partial[Coded]) -> Piece:
        if high == 0:
            return low(numbers)
        if high == numbers.shape[1]:
            return self._high(numbers)
        order = high_first(tier.to(torch.uint8))[..., None].expand_as(numbers)
        ordered = numbers.gather(1, order)
        return Tiered(self._high(ordered[:, :high]), low(ordered[:, high:]), packed_tier(tier))

    def _low(self, bits: int, balance: Tensor | None, numbers: Tensor) -> Coded:
        return Coded.of(numbers, Code(bits, self.group, CHANNELS), balance)

    def _high(self, numbers: Tensor) -> Piece:
        if self.important_bits is None:
            return Plain(owned(numbers))
        return Coded.of(numbers, Code(self.important_bits, self.group, CHANNELS))

    def _nbytes(self, slots: Tensor, high: Tensor, bits: int, form: SlotForm) -> Tensor:
        """Return the bytes of one head, of which so many slots are precise."""
        low, both = slots - high, (high > 0) & (high < slots)
        total = both * -(-slots // 8) + (low > 0) * form.key_dim * BALANCE_BYTES
        for dim in (form.key_dim, form.value_dim):
            total = total + Code(bits, self.group, CHANNELS).nbytes(low, dim, form.itemsize)
            if self.important_bits is None:
                total = total + high * dim * form.itemsize
            else:
                total = total + Code(self.important_bits, self.group, CHANNELS).nbytes(high, dim, form.itemsize)
        return total


def balancer(peaks: Tensor, keys: Tensor) -> Tensor:
    """Return `sqrt(max |q| / max |k|)` of each channel, `(heads, 1, dim)` float32; 1 where either is 0.

    Args:
        peaks: largest magnitude of the queries, `(heads, dim)`.
        keys: `(heads, slots, dim)`.
    """
    largest = keys.float().abs().amax(dim=1)
    known = (peaks > 0) & (largest > 0)
    factor = peaks.sqrt() / largest.sqrt()
    return torch.where(known, factor, 1.0)[:, None]


def _best(heads: Heads, high: int) -> Tensor:
    """Return which slots are the `high` best, `(heads, slots)` bool: protected ones first, the latest of them; then by
    importance, equal ones the earlier. Without importance the latest.
    """
    count, slots, _ = heads.keys.shape
    places = torch.arange(slots, device=heads.keys.device).expand(count, slots)
    importance = places.float() if heads.importance is None else heads.importance
    protected = importance.isinf()
    order = torch.where(protected, places.float(), importance).argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, protected.gather(-1, order).to(torch.uint8).argsort(dim=-1, descending=True, stable=True))
    return torch.zeros_like(protected).scatter_(1, order[:, :high], True)


def _balance(piece: Piece) -> Tensor | None:
    low = piece.low if isinstance(piece, Tiered) else piece
    return low.balance if isinstance(low, Coded) else None


@lru_cache(maxsize=4096)  # every layer and head of a request asks the same
def _fitted(store: MixedStore, slots: int, limit: int, form: SlotForm) -> Mix:
    """Return the bits, and the most precise slots, with which a head fits."""
    needed, most = Fraction(str(store.important)) * slots, 0
    for bits in FITTED_BITS:
        sizes = store._nbytes(torch.tensor(slots), torch.arange(slots + 1), bits, form)
        fitting = (sizes <= limit).nonzero()[:, 0].tolist()
        most = fitting[-1] if fitting else 0
        if fitting and most >= needed:
            return Mix(bits, most)
    return Mix(FITTED_BITS[-1], most)
