"""A strategy: parts, composed. Pure and immutable, so one strategy can serve any number of requests and threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kvcomp.core.budget import OR_SMALLEST, Budget
from kvcomp.core.composition import conflicts, trigger_conflicts, working
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
from kvcomp.core.shrinking import affordable_slots, smallest_ratio
from kvcomp.core.stages import stage
from kvcomp.core.trigger import PREFILL_END, Trigger
from kvcomp.core.types import Assignment, CompressedLayer, Guide, LayerView, MergePlan, Pivots, Scores, SlotForm

Turns = Literal["recompress", "append"]


@dataclass(frozen=True)
class Strategy:
    """A method of compression: one part per stage. Build it with `kvcomp.strategy(...)`.

    A strategy without a selector keeps every token: `full` ignores its budget, and where the store makes slots smaller
    the budget is the share of bytes.

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
        if faults := conflicts(self.parts) + trigger_conflicts(self.parts, self.trigger, self.turns):
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
        return tuple(dict.fromkeys(seen for part in working(self.parts) for seen in part.observations()))

    @property
    def ignores_budget(self) -> bool:
        """Return whether everything stays as it is at any budget."""
        return self.selector is None and not self.store.shrinks

    @property
    def reads_rotary(self) -> bool:
        """Return whether a part, a part inside one, or a statistic that one declares reads rotary embeddings."""
        members = (member for part in working(self.parts) for member in part.family())
        return any(member.rotary for member in (*members, *self.observations))

    @property
    def recompresses(self) -> bool:
        """Return whether anything is compressed while tokens are decoded."""
        return self.trigger.decoding and self.selector is not None and self.budget.ratio != 1

    def for_samples(self, numbers: Sequence[int]) -> Strategy:
        """Return the strategy for a batch of these samples of a task, with lots of their own where it draws any."""
        return self if self.scorer is None else replace(self, scorer=self.scorer.for_samples(numbers))

    def dump(self) -> dict[str, Any]:
        """Return the strategy as its file holds it; `kvcomp.strategy` reads it back to an equal one."""
        document: dict[str, Any] = {"name": self.name, "budget": self.budget.dump()}
        document |= {part.kind: part.dump() for part in self.parts}
        settings = {"mass_preserving": self.mass_preserving, "turns": self.turns, "trigger": self.trigger.dump()}
        return document | settings

    def slots(self, tokens: Tensor, form: SlotForm) -> Tensor:
        """Return the uniform share of the budget, `(batch,)`; all tokens where there is no selector.

        A ratio is of tokens, unless the store evicts: then as many stay as the store can hold in the budget's bytes.

        Args:
            tokens: valid tokens of each row, `(batch,)` int64 on the CPU.
            form: of the slots.

        Raises:
            BudgetError: bytes that do not pay for one slot.
        """
        if self.selector is None:
            return tokens
        if not (self.store.evicts or (self.store.shrinks and self.budget.bytes is not None)):
            return self.budget.slots(tokens, form.heads * form.slot_bytes)
        return affordable_slots(self.budget, self.store, tokens, form, even=self.allocator.even)

    def limit(self, tokens: Tensor, form: SlotForm) -> Tensor:
        """Return the bytes that keys and values of each row may take over all layers, `(batch,)` int64 on the CPU.

        Raises:
            BudgetError: every token stays, and the store cannot hold them in the budget's bytes.
        """
        full = form.heads * form.slot_bytes
        if self.selector is not None and not self.store.evicts:
            return self.slots(tokens, form) * full
        limit = self.budget.nbytes(tokens, full)
        needed = self.store.smallest(tokens, form)
        if self.selector is None and self.budget.or_smallest:
            return limit.maximum(needed)
        if self.selector is None and bool((needed > limit).any()):
            ratios = [smallest_ratio(need, count * full) for need, count in zip(needed, tokens, strict=True)]
            smallest = max(ratios)
            row = ratios.index(smallest)
            raise BudgetError(
                f"recipe {self.name!r} keeps every token, and store {self.store.use!r} cannot hold {int(tokens[row])} "
                f"tokens in {int(limit[row])} bytes; the smallest budget is the ratio {smallest:.6g}, as "
                f"`budget={smallest:.6g}` or `--budget {smallest:.6g}`, and '{self.budget}{OR_SMALLEST}' takes that by "
                "itself; or let the recipe evict down to the bytes (a "
                "scorer, a selector, and `evict: true` in the store)",
                smallest=smallest,
            )
        return limit

    def keeps_all(self, tokens: Tensor, form: SlotForm) -> bool:
        """Return whether rows of this many valid tokens, `(batch,)`, stay as they are."""
        if not self.store.shrinks:
            return bool((self.slots(tokens, form) >= tokens).all())
        full = tokens * form.heads * form.slot_bytes
        return self.store.fits and bool((self.limit(tokens, form) >= full).all())

    @stage("score")
    def scores(self, layer: LayerView, slots: Tensor | None = None) -> Scores:
        """Return the importance and the protection of each token. `slots` is the uniform share, `(batch,)`."""
        slots = self._share(layer) if slots is None else slots
        self._check_observed(layer)
        self._check_rotary(layer)
        protected = torch.zeros_like(layer.valid)
        if self.scorer not in working(self.parts):
            return Scores(torch.zeros(layer.shape, device=layer.keys.device), protected)
        values = self.scorer.score(layer, slots).float().nan_to_num()
        wanted = self.scorer.protect(layer, slots)
        protected = protected if wanted is None else wanted & layer.valid
        return Scores(values, protected, self.scorer.tiers(layer, slots))

    @stage("score")
    def together(self, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Sequence[Scores]:
        """Return the scores of all layers of a model as the scorer sees them together."""
        return scores if self.scorer is None else self.scorer.together(layers, scores)

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

    @stage("select")
    def allocate(
        self,
        slots: Tensor,
        layers: Sequence[LayerView],
        scores: Sequence[Scores],
        *,
        granted: Tensor | None = None,
    ) -> Tensor:
        """Return the slots of every head, `(layers, batch, kv_heads)`, none above what the head holds; without a
        selector nothing is shared out, and every head keeps what it holds.

        Args:
            slots: the uniform share, `(batch,)` int64 on the CPU.
            layers: this layer alone, or all layers, as the allocator's `scope` says.
            scores: of the same layers.
            granted: what each head was given before tokens were decoded, `(layers, batch, kv_heads)` int64 on the CPU;
                None where none were.
        """
        held = torch.stack([layer.valid.sum(dim=-1).cpu() for layer in layers])  # layers may be on several devices
        if self.selector is None:
            return held
        if self.budget.or_smallest:
            slots = slots.maximum(self.allocator.least(layers, scores).minimum(held.amax(dim=(0, 2))))
        try:
            if granted is None:
                allotted = self.allocator.allocate(slots, layers, scores)
            else:
                allotted = self.allocator.reallocate(slots, layers, scores, granted)
        except BudgetError as error:
            hint = f"; '{self.budget}{OR_SMALLEST}' takes that by itself" if error.smallest else ""
            raise BudgetError(f"recipe {self.name!r}: {error}{hint}", smallest=error.smallest) from None
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
            return _everything(layer, rho) if self.store.shrinks else MergePlan(None, None, rho)
        share = self._share(layer) if slots is None else slots.amax(dim=-1)
        scores = self.scores(layer, share) if scores is None else scores
        if slots is None:
            slots = self.allocate(share, [layer], [scores])[0]
        scores = self.for_slots(layer, scores, slots)
        policy = self.policy.plan(layer)
        pivots = self._select(self.selector, layer, scores, slots)
        return MergePlan(pivots, self._match(layer, pivots, scores, policy.rule), policy.rho)

    @stage("select")
    def _select(self, selector: PivotSelector, layer: LayerView, scores: Scores, slots: Tensor) -> Pivots:
        return selector.select(layer, scores, slots)

    @stage("match")
    def _match(self, layer: LayerView, pivots: Pivots, scores: Scores, rule: Tensor) -> Assignment:
        return self.matcher.match(layer, pivots, scores, rule)

    @stage("merge")
    def apply(self, layer: LayerView, plan: MergePlan) -> CompressedLayer:
        """Return what the layer keeps under this plan: new tensors, the view is not changed."""
        if plan.pivots is None or plan.assignment is None or _nothing_goes(layer, plan.pivots):
            everything = (layer.indices, layer.counts, layer.modality, layer.positions)
            return CompressedLayer(
                layer.keys, layer.values, *everything, mask=None if layer.valid.all() else layer.valid
            )
        self._check_rotary(layer)
        pivots = plan.pivots
        if self.selector is None:  # padding goes, and nothing is merged
            keys, values, counts = (pivots.gather(held) for held in (layer.keys, layer.values, layer.counts))
        else:
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

    @stage("store")
    def guide(self, layer: LayerView, plan: MergePlan, scores: Scores) -> Guide | None:
        """Return what the store may go by for the slots of this plan; None for a store that holds them as they are.

        The bytes of a row go to its heads and layers by the slots that they keep, as if all had the uniform share.
        Where heads keep different numbers because the bytes are short, each takes as few as it can.
        """
        if not self.store.shrinks or plan.pivots is None:
            return None
        tokens = layer.valid.sum(dim=-1).amax(dim=-1).cpu()
        share = self.slots(tokens, layer.form)[:, None]
        kept = plan.pivots.filled().sum(dim=-1).cpu()  # one sync per layer; bytes decide shapes
        limit = self.limit(tokens, layer.form)[:, None] * kept // (layer.form.heads * share)
        if self.store.evicts and not self.allocator.even:
            limit = limit.masked_fill(share < tokens[:, None], 0)
        importance = scores.values.masked_fill(scores.protected, float("inf"))
        return Guide(limit, plan.pivots.gather(importance), layer.observations)

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
                f"strategy {self.name!r} reads rotary embeddings, so the view must have "
                "`rotary`, a kvcomp.Rotary with the cos and sin of every token; got None"
            )

    def _share(self, layer: LayerView) -> Tensor:
        return self.slots(layer.valid.sum(dim=-1).amax(dim=-1).cpu(), layer.form)


def _nothing_goes(layer: LayerView, pivots: Pivots) -> bool:
    return pivots.mask is None and pivots.indices.shape[2] == layer.shape[2]


def _everything(layer: LayerView, rho: Tensor) -> MergePlan:
    """Return the plan that keeps every valid token."""
    held = layer.valid.sum(dim=-1, keepdim=True)
    most = int(held.max())
    order = (~layer.valid).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
    filled = torch.arange(most, device=held.device) < held
    pivots = Pivots(order) if bool(filled.all()) else Pivots(order.masked_fill(~filled, 0), filled)
    none = order[..., :0]
    return MergePlan(pivots, Assignment(none, none[..., None], none[..., None].float()), rho)
