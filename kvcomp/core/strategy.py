"""A strategy: parts, composed. Pure and immutable, so one strategy can serve any number of requests and threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kvcomp.core.budget import Budget
from kvcomp.core.errors import BudgetError, ConfigError, UnsupportedUseError
from kvcomp.core.interfaces import (
    BudgetAllocator,
    LayerPolicy,
    Matcher,
    Merger,
    Observation,
    Part,
    PivotSelector,
    Scorer,
    Store,
)
from kvcomp.core.trigger import PREFILL_END, Trigger
from kvcomp.core.types import CompressedLayer, LayerView, MergePlan, Scores

Turns = Literal["recompress", "append"]


@dataclass(frozen=True)
class Strategy:
    """A method of compression: one part per stage. Build it with `kvcomp.strategy(...)`.

    A strategy without a selector (`full`) keeps everything and ignores its budget.

    Attributes:
        budget: what may be kept.
        mass_preserving: add log(count) to the logits of a slot, so that it weighs as much as the tokens it stands for.
        turns: `recompress` (the budget is of all tokens seen) or `append` (what comes after the first compression
            stays).
        trigger: when to compress while tokens are decoded.
    """

    name: str
    budget: Budget
    policy: LayerPolicy
    allocator: BudgetAllocator
    matcher: Matcher
    merger: Merger
    store: Store
    scorer: Scorer | None = None
    selector: PivotSelector | None = None
    mass_preserving: bool = False
    turns: Turns = "recompress"
    trigger: Trigger = PREFILL_END

    def __post_init__(self) -> None:
        faults = [] if self.selector is None else conflicts(self.parts)
        if faults := faults + trigger_conflicts(self.parts, self.trigger, self.turns):
            raise ConfigError(faults, source=f"strategy {self.name!r}")

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return the parts that are present, in the order of the pipeline."""
        stages = (
            self.policy,
            self.scorer,
            self.allocator,
            self.selector,
            self.matcher,
            self.merger,
            self.store,
        )
        return tuple(part for part in stages if part is not None)

    @property
    def observations(self) -> tuple[Observation, ...]:
        """Return what all parts together need to see of the attention, each once."""
        if self.selector is None:
            return ()
        return tuple(dict.fromkeys(seen for part in self.parts for seen in part.observations()))

    @property
    def reads_rotary(self) -> bool:
        """Return whether a part, or a part inside one, reads `layer.rotary`."""
        return self.selector is not None and any(member.rotary for part in self.parts for member in part.family())

    @property
    def recompresses(self) -> bool:
        """Return whether anything is compressed while tokens are decoded."""
        return self.trigger.decoding and self.selector is not None and self.budget.ratio != 1

    def dump(self) -> dict[str, Any]:
        """Return the strategy as its file holds it; `kvcomp.strategy` reads it back to an equal one."""
        document: dict[str, Any] = {"name": self.name, "budget": self.budget.dump()}
        document |= {part.kind: part.dump() for part in self.parts}
        settings = {"mass_preserving": self.mass_preserving, "turns": self.turns, "trigger": self.trigger.dump()}
        return document | settings

    def slots(self, tokens: Tensor, slot_bytes: int) -> Tensor:
        """Return the uniform share of the budget, `(batch,)`; all tokens where there is no selector. See
        `Budget.slots`.
        """
        return tokens if self.selector is None else self.budget.slots(tokens, slot_bytes)

    def scores(self, layer: LayerView, slots: Tensor | None = None) -> Scores:
        """Return the importance and the protection of each token. `slots` is the uniform share, `(batch,)`."""
        slots = self._share(layer) if slots is None else slots
        self._check_observed(layer)
        self._check_rotary(layer)
        protected = torch.zeros_like(layer.valid)
        if self.scorer is None:
            return Scores(torch.zeros(layer.shape, device=layer.keys.device), protected)
        values = self.scorer.score(layer, slots).float().nan_to_num()
        wanted = self.scorer.protect(layer, slots)
        protected = protected if wanted is None else wanted & layer.valid
        return Scores(values, protected, self.scorer.tiers(layer, slots))

    def together(self, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Sequence[Scores]:
        """Return the scores of all layers of a model as the scorer sees them together."""
        return scores if self.scorer is None else self.scorer.together(layers, scores)

    def allocate(self, slots: Tensor, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Tensor:
        """Return the slots of every head, `(layers, batch, kv_heads)`, none above what the head holds."""
        held = torch.stack([layer.valid.sum(dim=-1) for layer in layers]).cpu()
        allotted = self.allocator.allocate(slots, layers, scores)
        given, request = allotted.sum(dim=(0, 2)), slots * allotted[:, 0].numel()
        if bool((given > request).any()) or bool((allotted < slots.clamp(max=1)[:, None]).any()):
            raise BudgetError(
                f"an allocator must give every head at least 1 slot and all of them no more than the request; "
                f"{self.allocator.use!r} gave {given.tolist()} of {request.tolist()}, at least {int(allotted.min())}"
            )
        return allotted.minimum(held)

    def plan(self, layer: LayerView, slots: Tensor | None = None, scores: Scores | None = None) -> MergePlan:
        """Return what happens to this layer, as data.

        Args:
            layer: what the layer holds, with the observations that `observations` names.
            slots: what each head was allotted, `(batch, kv_heads)` int64 on the CPU; by default the allocator is asked
                with the budget's share of this view's valid tokens.
            scores: from `scores`, by default computed here.
        """
        rho = torch.full((layer.shape[0],), float("nan"), device=layer.keys.device)
        if self.selector is None:
            return MergePlan(None, None, rho)
        share = self._share(layer) if slots is None else slots.amax(dim=-1)
        scores = self.scores(layer, share) if scores is None else scores
        if slots is None:
            slots = self.allocate(share, [layer], [scores])[0]
        scores = self.for_slots(layer, scores, slots)
        policy = self.policy.plan(layer)
        pivots = self.selector.select(layer, scores, slots)
        return MergePlan(pivots, self.matcher.match(layer, pivots, scores, policy.rule), policy.rho)

    def apply(self, layer: LayerView, plan: MergePlan) -> CompressedLayer:
        """Return what the layer keeps under this plan: new tensors, the view is not changed."""
        if plan.pivots is None or plan.assignment is None:
            everything = (layer.indices, layer.counts, layer.modality, layer.positions)
            return CompressedLayer(
                layer.keys, layer.values, *everything, mask=None if layer.valid.all() else layer.valid
            )
        self._check_rotary(layer)
        pivots = plan.pivots
        keys, values, counts = self.merger.merge(layer, pivots, plan.assignment)
        empty = ~pivots.filled()
        return CompressedLayer(
            keys=keys.to(layer.keys.dtype),
            values=values.to(layer.values.dtype),
            indices=pivots.gather(layer.indices).masked_fill(empty, -1),
            counts=counts.masked_fill(empty, 0.0),
            modality=pivots.gather(layer.modality),
            positions=torch.stack([pivots.gather(axis) for axis in layer.positions]),
            mask=pivots.mask,
        )

    def _check_observed(self, layer: LayerView) -> None:
        missing = [seen.use for seen in self.observations if seen not in layer.observations]
        if missing:
            raise UnsupportedUseError(
                f"strategy {self.name!r} reads attention statistics that the view does not hold: {', '.join(missing)}; "
                "kvcomp.core.attention.observe(inputs, strategy.observations) computes them"
            )

    def _check_rotary(self, layer: LayerView) -> None:
        if self.reads_rotary and layer.rotary is None:
            raise UnsupportedUseError(
                f"strategy {self.name!r} turns keys back to before their rotary embedding, so the view must have "
                "`rotary`, a kvcomp.Rotary with the cos and sin of every token; got None"
            )

    def _share(self, layer: LayerView) -> Tensor:
        itemsize = layer.keys.element_size()
        slot_bytes = layer.layers * layer.shape[1] * (layer.keys.shape[-1] + layer.values.shape[-1]) * itemsize
        return self.slots(layer.valid.sum(dim=-1).amax(dim=-1).cpu(), slot_bytes)

    def for_slots(self, layer: LayerView, scores: Scores, slots: Tensor) -> Scores:
        """Return the scores with tiers and protection for what was allotted, `(batch, kv_heads)`; where that is too
        little for what is protected, the latest win.
        """
        if self.scorer is None:
            return scores
        if not self.scorer.protects_by_share:
            wanted = self.scorer.protect(layer, slots)
            protected = torch.zeros_like(layer.valid) if wanted is None else wanted & layer.valid
            scores = replace(scores, protected=protected, tiers=self.scorer.tiers(layer, slots))
        from_end = scores.protected.flip(-1).cumsum(-1).flip(-1)  # 1 at the latest protected token
        fits = from_end <= slots.to(from_end.device)[..., None]
        return replace(scores, protected=scores.protected & fits)


def conflicts(parts: Sequence[Part]) -> list[str]:
    """Return a fault for every part, also inside another, that requires what no part of the pipeline provides."""
    members = [member for part in parts for member in part.family()]
    provided = frozenset().union(*(part.provides for part in members))
    return [
        f"{part.kind}: {part.use!r} needs {need}, which no part of this pipeline provides"
        for part in members
        for need in sorted(part.requires - provided)
    ]


def trigger_conflicts(parts: Sequence[Part], trigger: Trigger, turns: str) -> list[str]:
    """Return a fault for everything that cannot go together with compressing while tokens are decoded."""
    if not trigger.decoding:
        return []
    members = [member for part in parts for member in (*part.family(), *part.observations())]
    faults = [
        f"trigger: {part.kind} {part.use!r} cannot compress again while tokens are decoded: {part.prefill_only}"
        for part in dict.fromkeys(members)
        if part.prefill_only
    ]
    if turns == "append":
        faults.append(f"trigger: {trigger} compresses what turns: append says must stay; choose one of them")
    return faults
