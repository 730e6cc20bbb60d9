"""The cache of one request: what `generate()` is given as `past_key_values`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from kvcomp.core.errors import UnsupportedModelError, UnsupportedUseError
from kvcomp.core.strategy import Strategy
from kvcomp.core.types import LayerView, Scores
from kvcomp.runtime.adapter import ModelAdapter
from kvcomp.runtime.layer import CompressedCacheLayer
from kvcomp.runtime.report import Report, report_layer, storage_bytes


class Lease:
    """Says whether the model still runs the attention function that a cache needs."""

    active = True


class CompressedCache(Cache):
    """A cache that compresses itself at the end of every forward of more than one token.

    Make one with `kvcomp.compress(...)` or `session.cache(...)`. All state of a request lives here. Layers that are
    not full attention keep the kind that the model's configuration asks for.

    Args:
        strategy: what to keep.
        config: the model's configuration.
        adapter: knows which tokens are what.
        lease: of the session that switched the attention function on.
        defer: compress at `finish()` or at the first forward of one token, as if all chunks had been one.
        reserve: slots of room that each layer takes at the first decoded token.
    """

    def __init__(
        self,
        strategy: Strategy,
        config: Any,
        adapter: ModelAdapter,
        lease: Lease,
        *,
        defer: bool = False,
        reserve: int | None = None,
    ) -> None:
        stock = DynamicCache(config=config).layers
        full = [number for number, layer in enumerate(stock) if type(layer) is DynamicLayer]
        if not full:
            raise UnsupportedModelError("the model has no full-attention layer, so there is nothing to compress")
        self.strategy = strategy
        self.adapter = adapter
        self.lease = lease
        self.defer = defer
        self.reserve = reserve
        self.compressed_layers: dict[int, CompressedCacheLayer] = {
            number: CompressedCacheLayer(self, place, len(full)) for place, number in enumerate(full)
        }
        self._modality: Tensor | None = None
        self._positions: Tensor | None = None
        self._waiting: list[tuple[CompressedCacheLayer, LayerView, Scores]] = []
        super().__init__(layers=[self.compressed_layers.get(number, layer) for number, layer in enumerate(stock)])

    @property
    def used(self) -> bool:
        """Return whether the cache has seen a token."""
        return any(layer.is_initialized for layer in self.compressed_layers.values())

    def finish(self) -> None:
        """Compress what `defer` left uncompressed."""
        for layer in self.compressed_layers.values():
            if layer.forwards:
                self.compress_after(layer)

    def report(self) -> Report:
        """Return what every layer holds, in slots and in bytes read from the storages."""
        layers = tuple(report_layer(number, layer) for number, layer in self.compressed_layers.items())
        storages = sum(layer.storage.nbytes() for layer in self.compressed_layers.values())
        allocated = sum(layer.allocated_bytes for layer in layers)
        return Report(
            recipe=self.strategy.name,
            budget=str(self.strategy.budget) if self.strategy.selector else "1",
            turns=self.strategy.turns,
            layers=layers,
            untouched=tuple(number for number in range(len(self.layers)) if number not in self.compressed_layers),
            allocated_bytes=allocated,
            reserved_bytes=storages - allocated,
            bookkeeping_bytes=storage_bytes(self._bookkeeping()),
            full_bytes=sum(layer.full_bytes for layer in layers),
            seconds=sum(layer.seconds for layer in self.compressed_layers.values()),
        )

    # --- called by the session's hooks and by the layers ---

    def note_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Take note of what the model was called with: which new token is what."""
        self._modality = self.adapter.modality(inputs)

    def note_positions(self, positions: Tensor | None) -> None:
        """Take note of the positions `(batch, tokens)` or `(axes, batch, tokens)` of the new tokens; a first text row
        is dropped.
        """
        if positions is not None:
            positions = positions[None] if positions.dim() == 2 else positions[-3:]
        self._positions = positions

    def forward_ended(self) -> None:
        """Forget the inputs of this forward, and check that every layer's attention went through kvcomp.

        Raises:
            UnsupportedModelError: keys were cached that no attention function of kvcomp saw.
        """
        self._modality = self._positions = None
        missed = [number for number, layer in self.compressed_layers.items() if layer.arrived]
        if missed:
            raise UnsupportedModelError(
                f"layers {missed} cached keys that no registered attention function saw: this model's attention does "
                "not go through transformers' AttentionInterface, so its cache cannot be compressed"
            )

    def check_in_use(self) -> None:
        """Raise where the model no longer runs kvcomp's attention function."""
        if not self.lease.active:
            raise UnsupportedUseError(
                "a compressed cache can only be fed inside its `with kvcomp.compress(...)` block, or before its "
                "session is detached; outside, attention would see the wrong columns"
            )

    def arriving(self) -> tuple[Tensor | None, Tensor | None]:
        """Return modality and positions of the tokens of this forward, None where they are text at their columns."""
        return self._modality, self._positions

    def compress_after(self, layer: CompressedCacheLayer) -> None:
        """Compress a layer whose attention has run; with a model-wide allocator, all layers once the last one's has."""
        prepared = layer.prepare()
        if self.strategy.allocator.scope == "layer":
            if prepared is not None:
                layer.trim()
            return
        if prepared is not None:
            self._waiting.append((layer, *prepared))
        if layer.number == layer.layers - 1 and self._waiting:
            self._trim_together()

    def _trim_together(self) -> None:
        layers, views, scores = zip(*self._waiting, strict=True)
        share = layers[0].share()
        for layer, slots in zip(layers, self.strategy.allocate(share, views, scores), strict=True):
            layer.trim(slots)
        self._waiting.clear()

    def _bookkeeping(self) -> list[Tensor]:
        return [tensor for layer in self.compressed_layers.values() for tensor in layer.bookkeeping()]
