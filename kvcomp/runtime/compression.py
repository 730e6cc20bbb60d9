"""How the slots of one layer are compressed: what is looked at, what is kept, and what is remembered for later."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from kvcomp.core.errors import UnsupportedModelError, UnsupportedUseError
from kvcomp.core.interfaces import Observation
from kvcomp.core.rotary import Rotary
from kvcomp.core.stages import stage
from kvcomp.core.storage import SlotStorage
from kvcomp.core.strategy import Strategy
from kvcomp.core.types import CompressedLayer, Guide, LayerView, Pivots, Scores
from kvcomp.runtime.adapter import ModelAdapter
from kvcomp.runtime.decoding import FOLD, QueryLog
from kvcomp.runtime.forward import Forward
from kvcomp.runtime.rotary import RotaryColumns
from kvcomp.runtime.slots import SlotTable, gather_heads, padded
from kvcomp.runtime.state import LayerState
from kvcomp.runtime.trace import Watcher


class Request(Protocol):
    """What a layer asks of the cache that it belongs to."""

    strategy: Strategy
    adapter: ModelAdapter
    defer: bool
    compiled: bool
    reads_rotary: bool
    recompresses: bool
    remembers: bool  # keeps the latest queries for compressions while tokens are decoded, its own or of those it serves
    serves: tuple[Strategy, ...]
    observations: tuple[Observation, ...]  # of its strategy and of those it serves
    watcher: Watcher | None
    rotary_start: RotaryColumns  # without a column, the same for all layers

    def check_in_use(self) -> None:
        """Raise where the cache may not be written to."""

    def arriving(self) -> tuple[Tensor | None, Tensor | None]:
        """Return modality `(batch, tokens)` and positions `(axes, batch, tokens)` of the tokens of this forward."""

    def compress_after(self, layer: LayerCompression) -> None:
        """Compress a layer whose attention has run: now, with all others once the last one's has, or after a second
        pass.
        """

    def compress_decoded(self, layer: LayerCompression) -> None:
        """Compress all layers again if this is the last and the strategy's trigger says so after one more decoded
        token.
        """

    def finish(self) -> None:
        """Compress everything that was deferred."""


class LayerCompression(LayerState):
    """The slots of one layer of a request, and their compression in steps.

    `observe` takes the statistics of what arrived, `prepare` makes the view and the scores that slots are allotted by,
    `trim` compresses to what was allotted. While tokens are decoded, `fold` stands for a compression that is not due.
    """

    def __init__(self, request: Request, number: int, layers: int, storage: SlotStorage) -> None:
        self.request = request
        self.number = number  # among the compressed layers
        self.layers = layers
        self.is_compileable = request.compiled
        super().__init__(storage)

    def hold_nothing(self) -> None:
        """Forget everything."""
        super().hold_nothing()
        self.rho: Tensor | None = None  # (batch,), of the last compression
        self.seconds = 0.0
        self.forwards: tuple[Forward, ...] = ()  # seen by attention and not yet observed
        self.output: Tensor | None = None  # W_O while a compression waits
        self.compressions = 0
        self.forget_forward()

    def forget_forward(self) -> None:
        """Forget what is held only while a forward, or the compression at its end, is under way."""
        self.arrived = 0
        self.observed: Mapping[Observation, Tensor] | None = None  # of forwards that are not yet compressed
        self.repeated: Mapping[Observation, Tensor] = {}  # of a second pass over them
        self.alive: Tensor | None = None  # (batch, kv_heads, slots), what the last round of a second pass attended to
        self._view: LayerView | None = None
        self._scores: Scores | None = None

    @property
    def pending(self) -> bool:
        """Return whether tokens wait for their compression."""
        return bool(self.forwards) or self.observed is not None

    def wanted(self) -> tuple[Observation, ...]:
        """Return the statistics that the next compression reads, of any strategy that is served."""
        strategy = self.request.strategy
        if self.request.serves:
            return self.request.observations
        if self.overfull:
            return strategy.observations
        if self._stays():
            return ()
        policy = () if strategy.selector is None else strategy.policy.observations()
        return tuple(dict.fromkeys((*policy, *self._later())))

    @property
    def overfull(self) -> bool:
        """Return whether the next compression has something to trim."""
        return not self._stays() and not self._everything_fits()

    def excess(self) -> Tensor:
        """Return by how many slots each row holds more than its budget, over all heads, `(batch,)` on the CPU."""
        table = self.held_table
        assert table is not None
        held = table.slots * self.form.kv_heads if table.mask is None else table.mask.sum(dim=(1, 2)).cpu()
        return held + (self.tail - self.share()) * self.form.kv_heads

    def fold(self) -> None:
        """Go on without a compression: once enough tokens were decoded, add what they attended to to the sums that are
        carried.
        """
        self.output = None
        observations = self.request.strategy.observations
        if len(self.log.decoded) < FOLD or any(
            observation.latest is None for observation in observations if not observation.carried
        ):
            return
        self.take_in_tail()
        self.carried = self._with_carried(self._look_back(self._later()))
        self.log = self.log.keep((), self._remembered())

    def observe(self) -> None:
        """Take the statistics of the queries since the last compression, and let go of all that no later one reads."""
        self.observed = self._look_back([wanted for wanted in self.wanted() if wanted.repeat() is None])
        if self.request.remembers:
            self.log = self.log.keep(self.forwards, self._remembered())
        self.forwards = ()

    def go_on(self) -> None:
        """Keep of what another request saw of the prompt what this one would have seen itself.

        Raises:
            UnsupportedUseError: it saw less.
        """
        strategy, lacks = self.request.strategy, []
        if self.observed is not None:
            known = {**self.observed, **self.repeated}
            lacks = [seen.use for seen in strategy.observations if seen not in known]
        lacks += ["rotary embeddings"] if self.request.reads_rotary and self.rotary is None else []
        if lacks:
            raise UnsupportedUseError(
                f"the snapshot does not hold what strategy {strategy.name!r} wants to know of the prompt: "
                f"{', '.join(lacks)}; name it in session.shared_cache([...])"
            )
        self.rotary = self.rotary if self.request.reads_rotary else None
        self.log = self.log.keep((), self._remembered()) if self.request.recompresses else QueryLog()
        self.seconds = 0.0

    def prepare(self) -> tuple[LayerView, Scores] | None:
        """Return the view and the scores to allocate by, None where nothing is to be trimmed."""
        started = time.perf_counter()
        self.take_in_tail()
        prepared = None
        if self._stays():
            pass
        elif self._everything_fits():
            self._observe_only()
        else:
            self._view, self._scores = prepared = self.look(self.share())
        self.forwards, self.observed, self.repeated, self.alive, self.output = (), None, {}, None, None
        self.steps = 0
        self.compressions += 1
        self.seconds += time.perf_counter() - started
        return prepared

    def look(self, share: Tensor) -> tuple[LayerView, Scores]:
        """Return the view and the scores at a uniform share, `(batch,)`; nothing is changed."""
        view = self._make_view()
        return view, self.request.strategy.scores(view, share)

    def trim(self, slots: Tensor | None = None, scores: Scores | None = None) -> None:
        """Compress what `prepare` saw, to `slots` `(batch, kv_heads)` or to what the strategy's allocator gives this
        layer, by `scores` where other layers had a say in them.
        """
        started = time.perf_counter()
        table, view = self.table, self._view
        assert table is not None
        assert view is not None
        assert self._scores is not None
        strategy = self.request.strategy
        scores = self._scores if scores is None else scores
        if slots is None:
            slots = strategy.allocate(self.share(), [view], [scores])[0]
        plan = strategy.plan(view, slots, scores)
        if self.request.watcher is not None:
            self.request.watcher.compressed(view, plan)
        layer = strategy.apply(view, plan)
        assert plan.pivots is not None
        assert plan.assignment is not None
        self.rho, self.trimmed, self.holds_padding = plan.rho, True, False
        self.memory = plan.assignment.memory
        padded = table.columns is not table.indices
        self.table = SlotTable.of(layer, plan.pivots.gather(table.columns) if padded else None)
        self._store(layer, strategy.guide(view, plan, scores))
        self._carry(view, plan.pivots)
        self.rotary = self.rotary if self._reads_rotary else None
        self._view = self._scores = None
        self.seconds += time.perf_counter() - started

    @stage("store")
    def _store(self, layer: CompressedLayer, guide: Guide | None) -> None:
        self.storage.replace(layer.keys, layer.values, layer.mask, guide)

    def _stays(self) -> bool:
        """Return whether what came after the first compression stays as it is."""
        return self.request.strategy.turns == "append" and self.compressions > 0

    def _everything_fits(self) -> bool:
        """Return whether every row may keep all it holds, and holds no padding."""
        strategy = self.request.strategy
        if strategy.ignores_budget:
            return True
        assert self.held_table is not None
        return not self.trimmed and self.held_table.mask is None and strategy.keeps_all(self.tokens, self.form)

    def share(self) -> Tensor:
        """Return the uniform share of the budget, `(batch,)` on the CPU: of all tokens seen; with the trigger
        over-budget, a ratio is of those that its last forward of several tokens had seen.
        """
        strategy = self.request.strategy
        resolved = strategy.trigger.over_budget and strategy.budget.ratio is not None
        return strategy.slots(self.prompt if resolved else self.tokens + self.tail, self.form)

    def bookkeeping(self) -> list[Tensor]:
        """Return every tensor that the layer keeps beside keys and values."""
        return super().bookkeeping() if self.rho is None else [*super().bookkeeping(), self.rho]

    def _observe_only(self) -> None:
        """Measure rho, and what later turns add to, of a layer that keeps everything."""
        strategy = self.request.strategy
        if strategy.ignores_budget:
            return
        view = self._make_view()
        self.rho = None if strategy.selector is None else strategy.policy.plan(view).rho
        self.carried = {seen: view.observations[seen] for seen in self._later()}

    def _later(self) -> tuple[Observation, ...]:
        """Return the statistics that a later compression joins with its own."""
        strategy = self.request.strategy
        if strategy.budget.ratio == 1 or strategy.turns == "append":
            return ()
        return tuple(observation for observation in strategy.observations if observation.carried)

    def _make_view(self) -> LayerView:
        if self.observed is None:
            self.observe()
        table = self.table
        assert table is not None
        assert self.observed is not None
        keys, values = self.storage.read()
        return LayerView(
            keys=keys,
            values=values,
            modality=table.modality,
            valid=table.valid,
            indices=table.indices,
            counts=table.counts,
            positions=table.positions,
            layer=self.number,
            layers=self.layers,
            observations=self._with_carried({**self.observed, **self.repeated}),
            memory=self.memory,
            output=self.output,
            rotary=self._rotary(table) if self.request.reads_rotary else None,
        )

    @stage("observe")
    def _look_back(self, observations: Sequence[Observation]) -> dict[Observation, Tensor]:
        """Return the observations over the queries since the last compression."""
        keys, mass = self.storage.read()[0], self.request.strategy.mass_preserving
        rotary = self._all_columns() if any(observation.rotary for observation in observations) else None
        return self.log.observe(self.forwards, keys, self.whole_table(), observations, mass, rotary)

    def _with_carried(self, seen: Mapping[Observation, Tensor]) -> dict[Observation, Tensor]:
        """Return the statistics joined with what is carried of earlier ones."""
        before = {name: self._still_seen(sums) for name, sums in self.carried.items() if name in seen}
        return {name: name.join(before[name], now) if name in before else now for name, now in seen.items()}

    def _still_seen(self, before: Tensor) -> Tensor:
        """Return what is carried, `(batch, heads, slots)`, 0 for new tokens and for what a second pass has given up."""
        assert self.held_table is not None
        before = padded(before, self.held_table.slots)
        if self.alive is None:
            return before
        return before * self.alive.repeat_interleave(before.shape[1] // self.alive.shape[1], dim=1)

    def _remembered(self) -> int:
        """Return how many of the latest queries a later compression looks at."""
        return max((observation.latest or 0 for observation in self.request.observations), default=0)

    @property
    def _reads_rotary(self) -> bool:
        return self.request.reads_rotary and not self._stays()

    def _rotary(self, table: SlotTable) -> Rotary:
        """Return how the keys of all slots were rotated."""
        return self._all_columns().at(table.columns)

    def _all_columns(self) -> RotaryColumns:
        """Return the rotations of all columns.

        Raises:
            UnsupportedModelError: the attention module was not given the embeddings of every column.
        """
        known = 0 if self.rotary is None else self.rotary.columns
        if self.rotary is None or known != self.seen:
            raise UnsupportedModelError(
                f"strategy {self.request.strategy.name!r} turns keys or queries back to before their rotary embedding, "
                f"so every attention module must be given position_embeddings; layer {self.number} was given those of "
                f"{known} of {self.seen} tokens. Use a merger that does not turn keys back, such as pivot-mean, and a "
                "scorer that does not turn queries back, such as window-attention"
            )
        return self.rotary

    def _carry(self, view: LayerView, pivots: Pivots) -> None:
        """Keep the sums of the surviving slots, `(batch, heads, slots)`."""
        self.carried = {
            seen: gather_heads(result, pivots) for seen, result in view.observations.items() if seen in self._later()
        }
