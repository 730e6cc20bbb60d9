"""The cache of one request: what `generate()` is given as `past_key_values`."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from kvcomp.core.errors import UnsupportedModelError, UnsupportedUseError
from kvcomp.core.strategy import Strategy
from kvcomp.runtime import incoming
from kvcomp.runtime.adapter import ModelAdapter
from kvcomp.runtime.cache_argument import CACHE, NEW, OLD
from kvcomp.runtime.compression import LayerCompression
from kvcomp.runtime.fed import Fed
from kvcomp.runtime.fixed import check_reserve, check_steady
from kvcomp.runtime.incoming import given_tokens, new_token_count
from kvcomp.runtime.layer import NO_DRAFTS, CompressedCacheLayer
from kvcomp.runtime.report import Report, report_layers
from kvcomp.runtime.rotary import RotaryColumns
from kvcomp.runtime.schedule import Schedule
from kvcomp.runtime.second_pass import second_pass
from kvcomp.runtime.snapshots import Snapshot
from kvcomp.runtime.trace import Watcher
from kvcomp.runtime.turns import next_turn_arguments
from kvcomp.runtime.weights import Sample


class CompressedCache(Cache):
    """A cache that compresses itself at the end of every forward of more than one token.

    Make one with `kvcomp.compress(...)` or `session.cache(...)`. All state of a request lives here. Layers that are
    not full attention keep the kind that the model's configuration asks for.

    Args:
        strategy: what to keep.
        config: the model's configuration.
        adapter: knows which tokens are what.
        decoder: gives the text model while it runs the attention function that the cache needs, else None.
        weights: gives a sample of the model's weights, empty once the model is gone.
        defer: compress at `finish()` or at the first forward of one token, as if all chunks had been one.
        reserve: slots of room that each layer takes at the first decoded token.
        serves: strategies whose caches go on from a snapshot of this one, which looks for them and compresses nothing.
        compiled: take the room when the prompt has been compressed, so that slots lie at fixed addresses and a compiled
            decode step serves all tokens.
        watcher: is told of every compression.

    Raises:
        UnsupportedModelError: no layer can be compressed, or not all layers can hold slots at fixed addresses.
        UnsupportedUseError: `compiled` and something that moves slots while tokens are decoded.
    """

    def __init__(
        self,
        strategy: Strategy,
        config: Any,
        adapter: ModelAdapter,
        decoder: Callable[[], nn.Module | None],
        weights: Callable[[], Sample],
        *,
        defer: bool = False,
        reserve: int | None = None,
        serves: Sequence[Strategy] = (),
        compiled: bool = False,
        watcher: Watcher | None = None,
    ) -> None:
        check_reserve(reserve, compiled=compiled)
        stock = DynamicCache(config=config).layers
        full = [number for number, layer in enumerate(stock) if type(layer) is DynamicLayer]
        if not full:
            raise UnsupportedModelError("the model has no full-attention layer, so there is nothing to compress")
        self.strategy = strategy
        self.config = config
        self.adapter = adapter
        self.decoder = decoder
        self.weights = weights
        self.defer = defer
        self.reserve = reserve
        self.serves = tuple(serves)
        members = (strategy, *self.serves)
        self.observations = tuple(dict.fromkeys(seen for member in members for seen in member.observations))
        self.reads_rotary = any(member.reads_rotary for member in members)
        self.recompresses = strategy.recompresses
        self.remembers = any(member.recompresses for member in members)
        self.compiled = compiled
        self.watcher = watcher
        self.rotary_start = RotaryColumns()
        storages = strategy.store.open_all(len(full), reserve)
        if compiled:
            check_steady(strategy, storages, len(stock) - len(full), defer=defer)
        self.compressed_layers: dict[int, CompressedCacheLayer] = {
            number: CompressedCacheLayer(weakref.proxy(self), place, len(full), storages[place])
            for place, number in enumerate(full)
        }
        self.first_layer = self.compressed_layers[full[0]]
        self._modality: Tensor | None = None
        self._positions: Tensor | None = None
        self._given: Tensor | None = None  # ids or embeddings of the forward under way
        self._noted = False  # whether the inputs of the forward under way are known
        self._under_way = False  # whether the text model, or a compression, has begun and not ended
        self._schedule = Schedule(strategy)
        self._repeats = any(observation.repeat() for observation in self.observations)
        self.fed: tuple[Fed, ...] = ()  # what a second pass feeds again
        super().__init__(layers=[self.compressed_layers.get(number, layer) for number, layer in enumerate(stock)])

    @property
    def used(self) -> bool:
        """Return whether the cache has seen a token."""
        return any(layer.is_initialized for layer in self.compressed_layers.values())

    @property
    def is_fixed(self) -> bool:
        """Return whether slots lie at fixed addresses, so that a decode step changes nothing that Python sees."""
        return self.compiled and self.first_layer.fixed is not None

    def finish(self) -> None:
        """Compress what `defer` left uncompressed, or what waits for a second pass."""
        pending = {number: layer for number, layer in self.compressed_layers.items() if layer.pending}
        within, self._under_way = self._under_way, True
        if self._repeats and pending:
            self._repeat(pending)
            self.fed = ()
        for layer in pending.values():
            self._schedule.compress(layer)
        self._under_way = within
        if self.compiled and pending and not within:
            self._fix()

    def _repeat(self, pending: Mapping[int, CompressedCacheLayer]) -> None:
        """Feed the context once more, for what these layers want to know of that."""
        started = time.perf_counter()
        self.check_in_use()
        decoder = self.decoder()
        assert decoder is not None
        second_pass(decoder, self.layers, self.fed, pending)
        for layer in pending.values():
            layer.seconds += (time.perf_counter() - started) / len(pending)

    def next_turn(self, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        """Return the keyword arguments for `model.generate` in a later turn, this cache included.

        Models with M-RoPE keep the offset of their positions on the model, where it belongs to whoever called last.
        Here positions are explicit and this conversation's own, so other requests may come between.

            model.generate(**cache.next_turn(model, **processor_inputs), max_new_tokens=64)

        Args:
            model: the model.
            inputs: of the whole conversation, as the processor gives them. Media that the cache has seen are left out.

        Raises:
            InputError: the conversation does not begin with the tokens that the cache has seen, or ends with them.
            UnsupportedUseError: new media in a batch, or of a family that does not say which rows of pixels belong to
                which image.
        """
        self._catch_up()
        if "mm_token_type_ids" not in inputs and (modality := self.adapter.modality(inputs)) is not None:
            inputs["mm_token_type_ids"] = modality.int()
        return {**next_turn_arguments(model, inputs, self.first_layer), CACHE: self}

    def reset(self) -> None:
        """Forget everything, as if the cache were new."""
        super().reset()  # type: ignore[no-untyped-call]
        self.fed = ()
        self._forget_forward()

    def activate_past_recording(self) -> None:
        """Refuse assisted and prompt-lookup decoding, which call this before anything else, where drafts would be
        compressed.

        Raises:
            UnsupportedUseError: something may be compressed.
        """
        strategy = self.strategy
        if not (strategy.ignores_budget or (strategy.budget.ratio == 1 and not strategy.store.shrinks)):
            raise UnsupportedUseError(NO_DRAFTS)
        super().activate_past_recording()  # type: ignore[no-untyped-call]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns of all layers, or of none: `-n` removes n of them.

        Raises:
            UnsupportedUseError: a layer cannot remove them and leave everything else as it is.
        """
        for layer in self.compressed_layers.values():
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def snapshot(self) -> Snapshot:
        """Return the cache as it is now, sharing its memory. It stays valid whatever the cache does next.

        Raises:
            UnsupportedUseError: the last forward did not end.
        """
        self._check_ended()
        self._catch_up()
        return Snapshot.of(self.layers, self.strategy, self.fed)

    def restore(self, snapshot: Snapshot) -> None:
        """Make the cache what it was when the snapshot was taken; any number of times.

        context = cache.snapshot()
        for question in questions:
            model.generate(**question, past_key_values=cache)
            cache.restore(context)

        One of `session.shared_cache(strategies)` can be restored in a cache of any of these, as if that had read the
        prompt itself; it compresses at `finish()` or at the first token that is decoded.

        Raises:
            UnsupportedUseError: it is of another strategy, and compressed, or lacks what this one wants to know.
        """
        if snapshot.strategy == self.strategy:
            snapshot.put_back(self.layers)
        else:
            snapshot.hand_over(self.layers, self.strategy)
        self._forget_forward()
        self.fed = snapshot.fed if self._repeats else ()

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file, which `kvcomp.load_cache(path, model)` reads, in another process too.

        Raises:
            InputError: the file cannot be written.
            UnsupportedUseError: the cache is empty, waits for `finish()`, has layers that are not compressed, or its
                last forward did not end.
        """
        from kvcomp.runtime.files import save_cache  # files knows the cache, and is needed only here

        self._check_ended()
        self._catch_up()
        save_cache(self, Path(path))

    def report(self) -> Report:
        """Return what every layer holds, in slots and in bytes read from the storages.

        Raises:
            UnsupportedUseError: a compiled model decoded more tokens than there was room for.
        """
        self._catch_up()
        return report_layers(self.strategy, self.compressed_layers, len(self.layers))

    # --- called by the session's hooks and by the layers ---

    def note_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Take note of what the model was called with: which new token is what.

        Raises:
            InputError: there is no new token.
            UnsupportedUseError: the new tokens or their attention mask do not go with what the cache has seen, or the
                last forward did not end.
        """
        self._note(inputs)
        self._noted = True

    def text_begins(self, inputs: Mapping[str, Any]) -> None:
        """Take note of the positions of the new tokens, `(batch, tokens)` or `(axes, batch, tokens)`, and compress what
        was deferred before the first token that is decoded.

        Where there are four axes, the first is a row of text positions and is dropped.

        Raises:
            UnsupportedUseError: the text part of a multimodal model was called by itself.
        """
        if not self._noted:
            self._note(inputs)
        positions = inputs.get("position_ids")
        if positions is not None:
            positions = positions[None] if positions.dim() == 2 else positions[-3:]
            incoming.check_positions(positions, self.first_layer.upcoming_positions())
        self._positions = positions
        self._under_way = True
        if new_token_count(inputs) == 1:
            self.finish()

    def note_rotary(self, module: nn.Module, embeddings: Any) -> None:
        """Take note of the rotary embeddings that the attention module of a layer was given."""
        number = int(module.layer_idx)  # type: ignore[arg-type]
        if (layer := self.compressed_layers.get(number)) is not None:
            layer.note_rotary(module, embeddings)

    def text_ended(self, inputs: Mapping[str, Any]) -> None:
        """Keep what the text model was given where it is to be fed once more, which happens now unless it is deferred.

        Raises:
            UnsupportedUseError: nothing says how to feed it again.
        """
        if self._given is not None and self.first_layer.is_initialized:
            self.first_layer.note_tokens(self._given)
        self._given = None  # embeddings of a long prompt are large
        pending = {number: layer for number, layer in self.compressed_layers.items() if layer.pending}
        if self._repeats and pending:
            self.fed = (*self.fed, Fed.of(inputs))
            if self.serves:
                self._repeat(pending)
            elif not self.defer:
                self.finish()
        self._under_way = False
        if self.compiled and new_token_count(inputs) != 1:
            self._fix()

    def loosen(self) -> None:
        """Let slots at fixed addresses move again, because something else than one token comes."""
        for layer in self.compressed_layers.values():
            layer.loosen()

    def _fix(self) -> None:
        """Hold the slots of all layers at fixed addresses, with room for the tokens to come."""
        assert self.reserve is not None
        if not any(layer.arrived for layer in self.compressed_layers.values()):  # else `check_attended` will say so
            for layer in self.compressed_layers.values():
                layer.fix(self.reserve)

    def _catch_up(self) -> None:
        """Take note of the tokens of compiled decode steps.

        Raises:
            UnsupportedUseError: there were more than there was room for.
        """
        for layer in self.compressed_layers.values():
            layer.catch_up()
        incoming.check_room(self.compressed_layers, self.reserve)

    def _check_ended(self) -> None:
        """Raise where a forward was interrupted between two layers."""
        if self._under_way:
            raise UnsupportedUseError(
                "the last forward with this cache did not end, so its layers do not hold the same tokens; restore a "
                "snapshot, or use a new cache"
            )

    def _note(self, inputs: Mapping[str, Any]) -> None:
        """Take note of which new token is what; raise where they cannot go on from what the cache has seen."""
        self.loosen()
        self._check_ended()
        rows = len(self.first_layer.tokens) if self.used else None
        incoming.check_incoming(inputs, rows, self.get_seq_length(), shared=bool(self.serves))
        self._modality, self._given = self.adapter.modality(inputs), given_tokens(inputs)

    def _forget_forward(self) -> None:
        """Forget what is held only while a forward is under way."""
        self._modality = self._positions = self._given = None
        self._noted = self._under_way = False
        self._schedule.forget()

    def forward_ended(self) -> None:
        """Forget the inputs of this forward, and check that all its tokens have reached every layer.

        Raises:
            UnsupportedModelError: keys were cached that no attention function of kvcomp saw.
            UnsupportedUseError: a compiled model decoded more tokens than there was room for.
        """
        self._modality = self._positions = self._given = None
        self._noted = False
        self.check_sound()

    def check_sound(self) -> None:
        """Raise where keys were cached that no attention function of kvcomp saw, or decoded tokens found no room."""
        incoming.check_attended(self.compressed_layers)
        incoming.check_room(self.compressed_layers, self.reserve)

    def check_in_use(self) -> None:
        """Raise where the model no longer runs kvcomp's attention function, or the session's hooks missed the forward.

        Raises:
            UnsupportedUseError: it does not, or they did.
        """
        if self.decoder() is None:
            raise UnsupportedUseError(
                "a compressed cache can only be fed inside its `with kvcomp.compress(...)` block, or before its "
                "session is detached; outside, attention would see the wrong columns"
            )
        if not self._under_way:
            raise UnsupportedUseError(
                "kvcomp did not see this forward begin; a compressed cache works with the model that it was made for, "
                f"whose text model takes it as {NEW!r} or {OLD!r}"
            )

    def arriving(self) -> tuple[Tensor | None, Tensor | None]:
        """Return modality and positions of the tokens of this forward, None where they are text at their columns."""
        return self._modality, self._positions

    def compress_after(self, layer: LayerCompression) -> None:
        """Compress a layer whose attention has run; with a model-wide allocator, all layers once the last one's has;
        with a second pass, when the text model's forward ends. A shared cache only looks.
        """
        if self._repeats or self.serves:
            layer.observe()
        else:
            self._schedule.compress(layer)

    def compress_decoded(self, layer: LayerCompression) -> None:
        """Compress all layers again, where the trigger says so, once the last one has seen a decoded token."""
        if layer.number == layer.layers - 1:
            self._schedule.compress_decoded(list(self.compressed_layers.values()))
