"""Neighbouring layers share the directions of their keys and values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Store
from kvcomp.core.storage import SlotStorage
from kvcomp.core.types import Guide, SlotForm
from kvcomp_strategies.coding import ANEW, CodedStorage, Heads, Run
from kvcomp_strategies.pairing import length, shared_direction
from kvcomp_strategies.pieces import Piece, Plain, Tiered, held, high_first, owned, packed_tier
from kvcomp_strategies.quantization import finite


@held
@dataclass(frozen=True, eq=False)
class Merged(Piece):
    """Vectors as directions `(heads, tokens, dim)`, which two layers share, and lengths `(heads, tokens)`."""

    direction: Tensor
    lengths: Tensor

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return self.lengths.shape[1]

    @property
    def heads(self) -> int:
        """Return the number of heads."""
        return self.lengths.shape[0]

    def room(self, tokens: int) -> Tensor:
        """Return memory for tokens of these heads."""
        return self.direction.new_empty(self.direction.shape[0], tokens, self.direction.shape[2])

    def read(self) -> Tensor:
        """Return the directions at their lengths."""
        numbers = self.direction.float() * self.lengths.float()[..., None]
        return finite(numbers, self.direction.dtype)


@held
@dataclass(frozen=True, eq=False)
class Mirror(Piece):
    """What the upper layer of a pair has of its own; directions and tiers are the lower layer's.

    Attributes:
        high: `(heads, kept, dim)`, the tokens that were too far apart.
        lengths: `(heads, merged)` of the others.
    """

    high: Tensor
    lengths: Tensor

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return self.high.shape[1] + self.lengths.shape[1]

    @property
    def heads(self) -> int:
        """Return the number of heads."""
        return self.lengths.shape[0]

    def room(self, tokens: int) -> Tensor:
        """Return memory for tokens of these heads."""
        return self.high.new_empty(self.high.shape[0], tokens, self.high.shape[2])

    def read(self) -> Tensor:
        """Never called: a mirror shows nothing by itself."""
        raise AssertionError("a mirror is read together with the piece of the layer below")

    def over(self, below: Tiered) -> Tensor:
        """Return the tokens, given the lower layer's piece of the same tokens."""
        assert isinstance(below.low, Merged)
        return replace(below, high=Plain(self.high), low=replace(below.low, lengths=self.lengths)).read()


Shared = tuple[tuple[Tiered, ...], tuple[Tiered, ...]]  # what the lower layer shares of one run's keys and values


class LayerPairedStore(Store, use="layer-paired"):
    """Hold one direction for every token of two neighbouring layers, and the lengths of both.

    MiniCache (arXiv:2405.14366; the official repository has no code; `pyramidkv/minicache.py` in
    Zefan-Cai/KVCache-Factory): the keys of layers l - 1 and l, and separately their values, are merged by spherical
    interpolation per token and head; tokens whose directions are farthest apart are held exactly for both. From layer
    `start * layers` up, layers are paired; each pair is merged as soon as the upper layer is compressed. Decoded tokens
    are merged in blocks of `recent`, once twice as many are there.

    The budget is the share of bytes: as many tokens are held exactly as there is room for, at least `retain` of them;
    where everything fits, nothing is merged. Every token stays, so that the slots of two layers belong together: it
    works without a selector.

    Deviations: the paper's rule for outliers is a threshold between the smallest and the largest distance, the port's
    the farthest tokens, which is followed here and gives every head the same number; directions are held in the dtype
    of the cache; where two vectors are nearly parallel or opposite, the interpolation is on a line.

    Attributes:
        toward: how near the shared direction is to the upper layer's.
        retain: least share of the tokens that is held exactly, rounded up.
        start: share of the layers, from the first, that are left alone.
        recent: decoded tokens that are merged together.
    """

    prefill_only = ANEW

    toward: float = Field(default=0.6, ge=0.0, le=1.0)
    retain: float = Field(default=0.05, ge=0.0, le=1.0)
    start: float = Field(default=0.5, ge=0.0, le=1.0)
    recent: int = Field(default=32, ge=1)

    @property
    def shrinks(self) -> bool:
        """Return that slots take fewer bytes."""
        return True

    @property
    def fits(self) -> bool:
        """Return that the bytes decide."""
        return True

    def open(self, reserve: int | None = None) -> PairedStorage:
        """Return an empty storage of a layer that stands alone."""
        return PairedStorage(self)

    def open_all(self, layers: int, reserve: int | None = None) -> Sequence[SlotStorage]:
        """Return an empty storage for each layer; the upper one of a pair knows the lower."""
        storages = [self.open(reserve) for _ in range(layers)]
        for upper in self.uppers(layers):
            storages[upper] = PairedStorage(self, storages[upper - 1], layers)
        return storages

    def uppers(self, layers: int) -> range:
        """Return the upper layers of all pairs."""
        return range(int(self.start * layers) + 1, layers, 2)

    def smallest(self, slots: Tensor, form: SlotForm) -> Tensor:
        """Return the bytes with the fewest tokens held exactly."""
        pairs, full = len(self.uppers(form.layers)), slots * form.slot_bytes
        paired = self.pair_bytes(slots, (slots * self.retain).ceil().long(), form).minimum(2 * full)
        return form.kv_heads * ((form.layers - 2 * pairs) * full + pairs * paired)

    def pair_bytes(self, slots: Tensor, kept: Tensor, form: SlotForm) -> Tensor:
        """Return the bytes of one head in two layers, of which so many slots are held exactly."""
        dims = form.key_dim + form.value_dim
        merged = (slots - kept) * (dims + 4)  # a direction, and two lengths, of a key and of a value
        return (merged + 2 * kept * dims) * form.itemsize + 2 * -(-slots // 8)

    def least(self, slots: int) -> int:
        """Return how many slots are held exactly at least."""
        return math.ceil(slots * self.retain)

    def most(self, slots: int, limit: int, layers: int, form: SlotForm) -> int:
        """Return how many of a head's slots can be held exactly, given its bytes in each layer on average."""
        pairs = len(self.uppers(layers))
        room = (limit * layers - (layers - 2 * pairs) * slots * form.slot_bytes) // pairs
        if room >= 2 * slots * form.slot_bytes:
            return slots
        sizes = self.pair_bytes(torch.tensor(slots), torch.arange(slots), form)
        return int((sizes <= room).sum()) - 1

    def setting(self, slots: int, limit: int | None, form: SlotForm) -> None:
        """Return that a layer by itself is held as it is."""

    def extras(self, guide: Guide) -> Tensor | None:
        """Return that nothing more is needed."""
        return None

    def encode(self, heads: Heads, setting: Any) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Never called: no layer has a setting of its own."""
        raise AssertionError("pairs are merged by their storage")

    def settle(self, runs: Sequence[Run]) -> Sequence[Run]:
        """Return the runs as they are: pairs are merged by their storage."""
        return runs

    def merge(self, lower: Tensor, upper: Tensor, kept: int) -> tuple[Tiered, Mirror]:
        """Return the pieces of both layers, of `(heads, tokens, dim)` each."""
        direction, apart = shared_direction(lower, upper, self.toward)
        far = apart.argsort(dim=-1, descending=True, stable=True)[:, :kept]
        tier = torch.zeros_like(apart, dtype=torch.bool).scatter_(1, far, True)
        order = high_first(tier.to(torch.uint8))[..., None].expand_as(lower)
        high, low = order[:, :kept], order[:, kept:]
        lengths = [finite(length(numbers).gather(1, low[..., 0]), lower.dtype) for numbers in (lower, upper)]
        merged = Merged(finite(direction, lower.dtype).gather(1, low), lengths[0])
        return Tiered(Plain(lower.gather(1, high)), merged, packed_tier(tier)), Mirror(
            upper.gather(1, high), lengths[1]
        )


class PairedStorage(CodedStorage):
    """The slots of one layer. The upper one of a pair merges both when it is compressed.

    It keeps hold of what the lower layer shares, for a later forward compresses the lower layer before the upper has
    been read. Apart from that the layers of a cache change together, the lower first. The setting of a run is whether
    it is merged.
    """

    def __init__(self, store: LayerPairedStore, below: PairedStorage | None = None, layers: int = 1) -> None:
        super().__init__(store)
        self._store = store
        self._below = below
        self._layers = layers
        self._shared: tuple[Shared, ...] = ()  # of each run

    def replace(self, keys: Tensor, values: Tensor, mask: Tensor | None = None, guide: Guide | None = None) -> None:
        """Hold these slots, merged with those of the layer below where they do not fit, or were merged before."""
        merged = any(run.setting for run in self._slots.runs)
        super().replace(keys, values, mask)
        self._shared = ()
        if self._below is None or not (merged or guide):
            return
        form = SlotForm(1, 1, keys.shape[-1], values.shape[-1], keys.element_size())
        for place, run in enumerate(self._slots.runs):
            kept = self._store.least(run.replaced)
            if guide is not None:
                limit = int(guide.limit.flatten()[run.heads[0]])
                kept = max(kept, self._store.most(run.replaced, limit, self._layers, form))
            if kept < run.replaced:
                self._merge(place, run.replaced, kept)
        self._look_below()

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add slots at the end as they are, after blocks that are no longer recent were merged."""
        recent = self._store.recent
        for place, run in enumerate(self._slots.runs):
            if run.setting and run.plain[0] >= 2 * recent:
                self._merge(place, recent, self._store.least(recent))
                self._look_below()
        super().append(keys, values)

    def read(self) -> tuple[Tensor, Tensor]:
        """Return what directions and lengths stand for, and what is held as it is."""
        if not self._shared:
            return super().read()
        pairs = list(zip(self._slots.runs, self._shared, strict=True))
        keys = self._laid_out([(Plain(_read(run.keys, below)),) for run, (below, _) in pairs])
        return keys, self._laid_out([(Plain(_read(run.values, below)),) for run, (_, below) in pairs])

    def select(self, rows: Tensor) -> None:
        """Hold these rows; the layer below holds them already."""
        super().select(rows)
        self._look_below()

    def move(self, device: torch.device) -> None:
        """Hold everything on a device; the layer below is there already."""
        super().move(device)
        self._look_below()

    def load(self, tensors: Mapping[str, Tensor], data: Any) -> None:
        """Hold what was dumped; the layer below holds it already."""
        super().load(tensors, data)
        self._look_below()

    def snapshot(self) -> Any:
        """Return what is held, and what the layer below shares."""
        return super().snapshot(), self._shared

    def restore(self, snapshot: Any) -> None:
        """Hold what a snapshot holds."""
        held, self._shared = snapshot
        super().restore(held)

    def _merge(self, place: int, count: int, kept: int) -> None:
        """Merge the first `count` plain slots of a run with those of the layer below, all but `kept` of them."""
        assert self._below is not None
        upper, lower = self._slots.runs[place], self._below._slots.runs[place]
        keys = _merged(lower.keys, upper.keys, count, kept, self._store)
        values = _merged(lower.values, upper.values, count, kept, self._store)
        self._below._exchange(place, replace(lower, keys=keys[0], values=values[0]))
        self._exchange(place, replace(upper, keys=keys[1], values=values[1], setting=True))

    def _exchange(self, place: int, run: Run) -> None:
        runs = self._slots.runs
        self._slots = replace(self._slots, runs=(*runs[:place], run, *runs[place + 1 :]))

    def _look_below(self) -> None:
        """Take hold of what the layer below shares."""
        if self._below is not None and any(run.setting for run in self._slots.runs):
            self._shared = tuple((_tiered(run.keys), _tiered(run.values)) for run in self._below._slots.runs)


def _tiered(pieces: tuple[Piece, ...]) -> tuple[Tiered, ...]:
    return tuple(piece for piece in pieces if isinstance(piece, Tiered))


def _read(pieces: tuple[Piece, ...], below: tuple[Tiered, ...]) -> Tensor:
    """Return all tokens of the upper layer, `(heads, tokens, dim)`; mirrors and what they mirror are in one order."""
    mirrored = iter(below)
    parts = [piece.over(next(mirrored)) if isinstance(piece, Mirror) else piece.read() for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _merged(
    lower: tuple[Piece, ...], upper: tuple[Piece, ...], count: int, kept: int, store: LayerPairedStore
) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Return the pieces of both layers with the first `count` plain tokens merged."""
    one, two = lower[-1], upper[-1]
    assert isinstance(one, Plain)
    assert isinstance(two, Plain)
    shared, mirror = store.merge(one.numbers[:, :count], two.numbers[:, :count], kept)
    rests = [(Plain(owned(piece.numbers[:, count:])),) if piece.tokens > count else () for piece in (one, two)]
    return (*lower[:-1], shared, *rests[0]), (*upper[:-1], mirror, *rests[1])
