"""The second pass: the context is fed to the text model once more and attends to its own full cache, which stays as it
is.

It runs when a forward has ended and before anything is trimmed, so that all layers are whole for the time of about one
more prefill. The repeated tokens come after the context: each chunk takes the positions that follow the last one seen,
shifted as a whole, so that an image keeps its grid. A chunk sees the context and itself, and no other chunk.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from kvcomp.core.interfaces import Observation
from kvcomp.core.types import Repeat
from kvcomp.runtime.cache_argument import CACHE
from kvcomp.runtime.fed import Fed
from kvcomp.runtime.fixed import LAYER_ATTRIBUTE
from kvcomp.runtime.forward import Forward, Logits, observe_forwards
from kvcomp.runtime.layer import CompressedCacheLayer
from kvcomp.runtime.masks import over_slots, with_mass
from kvcomp.runtime.slots import SlotTable, new_tokens


def second_pass(
    decoder: nn.Module, cache_layers: Sequence[Any], fed: Sequence[Fed], pending: Mapping[int, CompressedCacheLayer]
) -> None:
    """Give each layer the statistics of a second pass that it wants, `layer.repeated`.

    Args:
        decoder: the text model.
        cache_layers: of the cache; what they hold is not changed.
        fed: what the forwards since the last compression were given.
        pending: the layers that wait for their compression, by their number in the cache.
    """
    with torch.no_grad():
        context = Context.of(decoder, cache_layers, fed)
        _repeat(context, pending)
        overfull = [layer for layer in pending.values() if layer.overfull]
        for share in _rounds(overfull):
            _narrow(overfull, share)
            for layer in pending.values():
                layer.repeated = {}
            _repeat(context, pending)


def _repeat(context: Context, pending: Mapping[int, CompressedCacheLayer]) -> None:
    """Feed the context once more for each way in which a statistic that is not known yet wants it fed."""
    passes: dict[Repeat, dict[int, list[Observation]]] = {}
    for number, layer in pending.items():
        for observation in layer.wanted():
            if observation not in layer.repeated and (repeat := observation.repeat()) is not None:
                passes.setdefault(repeat, {}).setdefault(number, []).append(observation)
    for repeat, wanted in passes.items():
        for chunk in context.chunks(repeat):
            context.feed(chunk, wanted)


def _rounds(layers: Sequence[CompressedCacheLayer]) -> Sequence[Tensor]:
    strategy = layers[0].request.strategy if layers else None
    if strategy is None or strategy.scorer is None or strategy.selector is None:
        return ()
    return strategy.scorer.rounds(layers[0].tokens, layers[0].share())


def _narrow(layers: Sequence[CompressedCacheLayer], share: Tensor) -> None:
    """Leave alive what would be kept at a uniform share, `(batch,)`."""
    strategy = layers[0].request.strategy
    looks = [layer.look(share) for layer in layers]
    if strategy.allocator.scope == "layer":
        slots = torch.cat([strategy.allocate(share, [view], [scores]) for view, scores in looks])
    else:
        views, scores = zip(*looks, strict=True)
        looks = list(zip(views, strategy.together(views, scores), strict=True))
        slots = strategy.allocate(share, *zip(*looks, strict=True))
    for layer, (view, seen), allotted in zip(layers, looks, slots, strict=True):
        assert strategy.selector is not None
        pivots = strategy.selector.select(view, strategy.for_slots(view, seen, allotted), allotted)
        places = pivots.indices.masked_fill(~pivots.filled(), view.shape[2])  # empty slots fall behind the last token
        alive = torch.zeros(*view.shape[:2], view.shape[2] + 1, dtype=torch.bool, device=places.device)
        layer.alive = alive.scatter(2, places, True)[..., :-1]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some tokens of each row, its own first ones first, so that a row in a batch is cut as it is alone.

    Attributes:
        inputs: what is fed.
        positions: `(axes, batch, tokens)` int64.
        valid: `(batch, tokens)` bool, false after the end of a row.
        modality: `(batch, tokens)` int8.
    """

    inputs: Fed
    positions: Tensor
    valid: Tensor
    modality: Tensor


@dataclass(frozen=True, eq=False)
class Context:
    """What is fed once more, and the cache that it attends to.

    Attributes:
        inputs: what was fed since the last compression.
        table: of the same tokens.
        next_positions: `(axes, batch)`, of the token that would follow the last valid one of each row.
        order: `(batch, tokens)`, the valid tokens first.
        lengths: `(batch,)`, how many are valid.
    """

    decoder: nn.Module
    cache_layers: Sequence[Any]
    inputs: Fed
    table: SlotTable
    next_positions: Tensor
    order: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, decoder: nn.Module, cache_layers: Sequence[Any], fed: Sequence[Fed]) -> Context:
        """Return the context that these forwards made."""
        inputs = Fed.joined(decoder, fed)
        batch, tokens = inputs.tokens.shape[:2]
        layer = _first(cache_layers)
        table = layer.whole_table().map(lambda entry: entry[:, :1, -tokens:])
        valid = table.valid[:, 0].expand(batch, -1)
        largest = table.positions[:, :, 0].masked_fill(~valid, -1).amax(dim=(0, 2))  # whatever pads come after it
        return cls(
            decoder,
            cache_layers,
            inputs,
            table,
            next_positions=(largest.long() + 1).expand(table.positions.shape[0], batch),
            order=(~valid).to(torch.uint8).argsort(dim=-1, stable=True),
            lengths=valid.sum(dim=-1),
        )

    def chunks(self, repeat: Repeat) -> Iterator[Chunk]:
        """Yield the chunks, those of a row the same in any batch."""
        for start in range(0, int(self.lengths.max()), repeat.chunk):
            if repeat.noise:
                yield from self._noise(start, repeat)
                continue
            first = max(0, start - repeat.overlap)
            places = torch.arange(first, min(start + repeat.chunk, self.order.shape[1]), device=self.order.device)
            more = self.lengths[:, None] > start  # a row that has ended is not repeated for its overlap
            chunk = self._chunk(self.order[:, places], (places < self.lengths[:, None]) & more)
            yield self._instructed(chunk, repeat.instruction) if repeat.instruction else chunk

    def _chunk(self, index: Tensor, valid: Tensor) -> Chunk:
        positions = torch.stack([axis[:, 0].expand_as(self.order).gather(1, index) for axis in self.table.positions])
        positions = positions.long()
        first = positions.masked_fill(~valid, torch.iinfo(torch.int64).max).amin(dim=(0, 2))  # (batch,)
        shifted = positions - first[:, None] + self.next_positions[..., None]
        modality = self.table.modality[:, 0].expand_as(self.order).gather(1, index)
        return Chunk(self.inputs.at(index), shifted.masked_fill(~valid, 0), valid, modality)

    def _instructed(self, chunk: Chunk, instruction: tuple[int, ...]) -> Chunk:
        """Return the chunk behind an instruction, which is text."""
        batch, count = chunk.valid.shape[0], len(instruction)
        ids = torch.tensor(instruction, device=chunk.valid.device).expand(batch, -1)
        before = self.next_positions[..., None] + torch.arange(count, device=ids.device)
        asked = chunk.valid.any(dim=-1, keepdim=True).expand(-1, count)
        return Chunk(
            chunk.inputs.behind(ids, self.decoder),
            torch.cat([before, chunk.positions + count], dim=2),
            torch.cat([asked, chunk.valid], dim=1),
            torch.cat([torch.zeros_like(ids, dtype=torch.int8), chunk.modality], dim=1),
        )

    def _noise(self, start: int, repeat: Repeat) -> Iterator[Chunk]:
        """Yield tokens drawn from the vocabulary, as many as the chunk that starts there has in each row; all rows have
        the same first ones.
        """
        counts = (self.lengths - start).clamp(min=0, max=repeat.chunk)
        places = torch.arange(int(counts.max()), device=counts.device)
        valid = places < counts[:, None]
        positions = (self.next_positions[..., None] + places).masked_fill(~valid, 0)
        for number in range(repeat.noise):
            drawn = torch.Generator().manual_seed(start + number)  # of the CPU, so that all devices read the same
            ids = torch.randint(_vocabulary(self.decoder), (len(places),), generator=drawn)
            ids = ids.to(counts.device).expand(len(counts), -1)
            yield Chunk(Fed(ids), positions, valid, torch.zeros_like(ids, dtype=torch.int8))

    def feed(self, chunk: Chunk, observations: Mapping[int, Sequence[Observation]]) -> None:
        """Run the text model on one chunk, and join what is observed with what the layers know of the others."""
        probes = {
            number: ProbeLayer(layer, chunk, observations.get(number, ()))
            for number, layer in enumerate(self.cache_layers)
            if isinstance(layer, CompressedCacheLayer)
        }
        others = [probes.get(number) or copy.deepcopy(layer) for number, layer in enumerate(self.cache_layers)]
        positions = chunk.positions if len(chunk.positions) > 1 else chunk.positions[0]
        self.decoder(
            **chunk.inputs.arguments(),
            attention_mask=self._mask(chunk),
            position_ids=positions,
            **{CACHE: Cache(layers=others)},
            use_cache=True,
        )
        for number in observations:
            layer = probes[number].layer
            for observation, now in probes[number].seen.items():
                before = layer.repeated.get(observation)
                joined = now if before is None else observation.join(before, now)
                layer.repeated = {**layer.repeated, observation: joined}

    def _mask(self, chunk: Chunk) -> Tensor:
        """Return the padding mask over the columns of the cache and of the chunk, `(batch, columns)` int64."""
        layer = _first(self.cache_layers)
        batch = chunk.valid.shape[0]
        before = chunk.valid.new_ones(batch, layer.seen)
        if not layer.trimmed:  # else the slots of each layer know which of them are filled
            before = layer.whole_table().valid[:, 0].expand(batch, -1)
        return torch.cat([before, chunk.valid], dim=1).long()


def _vocabulary(decoder: Any) -> int:
    """Return how many tokens text may have; Gemma's embeddings of every layer know fewer than its first ones."""
    known = ("vocab_size", "vocab_size_per_layer_input")
    return min(int(getattr(decoder.config, name)) for name in known if hasattr(decoder.config, name))


def _first(cache_layers: Sequence[Any]) -> CompressedCacheLayer:
    return next(layer for layer in cache_layers if isinstance(layer, CompressedCacheLayer))


class ProbeLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of the cache as a second pass sees it: `update()` returns old and new keys and stores nothing.

    Args:
        layer: whose slots are attended to.
        chunk: what is fed.
        observations: statistics of its attention to the slots.
    """

    def __init__(self, layer: CompressedCacheLayer, chunk: Chunk, observations: Sequence[Observation]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer = layer
        self.observations = observations
        batch, tokens = chunk.valid.shape
        self.arrived = tokens
        self.modality = chunk.modality
        self.valid = None if bool(chunk.valid.all()) else chunk.valid
        self.table = layer.whole_table()
        if layer.alive is not None:
            self.table = self.table.masked(self.table.valid & layer.alive)
        self.slots = self.table.slots
        new = new_tokens(
            (batch, self.table.indices.shape[1], tokens),
            layer.seen,
            layer.tokens,
            device=chunk.valid.device,
            valid=self.valid,
            modality=self.modality,
        )
        self.table = self.table.extend(new)
        self.seen: dict[Observation, Tensor] = {}
        self._keys: Tensor | None = None  # of slots and chunk, until attention has run

    def get_seq_length(self) -> int:
        """Return the number of columns before the chunk."""
        return self.layer.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the width of the mask over columns, and offset 0."""
        return self.layer.seen + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values of the slots, then of the chunk."""
        keys, values = self.layer.storage.read()
        self._keys = torch.cat([keys, key_states], dim=2)
        joined = self._keys[:]  # a fresh view, as in CompressedCacheLayer.update
        setattr(joined, LAYER_ATTRIBUTE, self)
        return joined, torch.cat([values, value_states], dim=2)

    def packed(self, base: str, query: Tensor, mask: Tensor | None, logits: Logits) -> None:
        """Return None: the chunk's keys lie behind a copy of the slots."""

    def unpacked(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `update` returned."""
        return keys, values

    def slot_mask(self, mask: Tensor | None, queries: Tensor, *, aligned: bool) -> Tensor | None:
        """Return the mask over slots and chunk, given transformers' mask over columns."""
        if not self.layer.trimmed and self.layer.alive is None:
            return mask
        group = queries.shape[1] // self.table.indices.shape[1]
        slot_mask = over_slots(mask, self.table, self.arrived, self.layer.seen, group)
        if not self.layer.request.strategy.mass_preserving:
            return slot_mask
        return with_mass(slot_mask, self.table.counts, group, queries.dtype)

    def attended(
        self, module: nn.Module, queries: Tensor, mask: Tensor | None, slot_mask: Tensor | None, logits: Logits
    ) -> None:
        """Take the statistics of the chunk's attention, of which those of the slots count."""
        columns = torch.arange(self.layer.seen, self.layer.seen + self.arrived, device=queries.device)
        forward = Forward(queries, slot_mask, columns, self.valid, self.modality, logits)
        assert self._keys is not None
        seen = observe_forwards((forward,), self._keys, self.table, self.observations)
        self._keys = None
        self.seen = {observation: result[..., : self.slots] for observation, result in seen.items()}
