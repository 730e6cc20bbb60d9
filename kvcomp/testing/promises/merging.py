"""Where tokens go, and what becomes of those they go to."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvcomp.core.strategy import Strategy
from kvcomp.core.types import LayerView, Rule
from kvcomp.testing.failures import require, require_all, require_close, require_same
from kvcomp.testing.runs import Run, run, run_view, view_for
from kvcomp.testing.samples import Sample


def edges_are_well_formed(strategy: Strategy, sample: Sample) -> None:
    """Edges lead from valid tokens that do not stay to filled slots; the weights of a source are 1 in sum, or 0."""
    if strategy.selector is None:
        return
    seen = run(strategy, sample)
    assignment, tokens = seen.assignment, seen.view.shape[2]
    sources, targets, weights = assignment.sources, assignment.targets, assignment.weights
    require(targets.dim() == 4, f"targets must be (batch, kv_heads, others, fanout), got {tuple(targets.shape)}")
    require(sources.shape == targets.shape[:3], "sources must be (batch, kv_heads, others), as the targets are")
    require(weights.shape == targets.shape, "weights must have the shape of the targets")
    real = sources >= 0
    require_all((sources.diff(dim=-1) > 0) | ~real[..., 1:], "sources must be ascending, with -1 only at the end")
    others = (seen.view.valid & ~seen.kept()).gather(2, sources.clamp(min=0, max=max(tokens - 1, 0)))
    require_all(others | ~real, "sources must be valid tokens that do not stay")
    slots = seen.pivots.indices.shape[2]
    require_all((targets >= -1) & (targets < slots), f"targets must be slot numbers in 0..{slots - 1}, or -1")
    filled = seen.pivots.filled().gather(2, targets.clamp(min=0).flatten(2)).view_as(targets)
    require_all(filled | (targets < 0), "targets must be filled slots")
    require_all((targets < 0) | real[..., None], "what is no token must have no target")
    total = weights.masked_fill(targets < 0, 0.0).sum(dim=-1)
    require_close(total, assignment.merged.float(), 1e-5, "the weights of a source must be 1 in sum, 0 without target")


def modality_rules(strategy: Strategy, sample: Sample) -> None:
    """Under INTRA no edge crosses modalities, under HETERO each does, under NONE there is none."""
    if strategy.selector is None:
        return
    seen = run(strategy, sample)
    source, target = (
        seen.view.compared_modality[..., None],
        seen.pivots.gather(seen.view.compared_modality)[..., None, :],
    )
    forbidden = {Rule.INTRA: source != target, Rule.HETERO: source == target, Rule.NONE: torch.tensor(True)}
    for rule, never in forbidden.items():
        edges = _under(seen, rule).edges() > 0
        require_all(~(edges & never), f"under the rule {rule.name} no edge may lead to such a pivot")


def _under(seen: Run, rule: Rule) -> Run:
    """Return the run with its edges drawn anew under this rule, for every row."""
    rules = torch.full((seen.view.shape[0],), int(rule), dtype=torch.int8)
    scores = replace(seen.scores, protected=seen.protected())
    edges = seen.strategy.matcher.match(seen.view, seen.pivots, scores, rules)
    return replace(seen, plan=replace(seen.plan, assignment=edges))


def locked_pivots(strategy: Strategy, sample: Sample) -> None:
    """Nothing is merged into a protected pivot, and a pivot that receives nothing keeps its bits."""
    if strategy.selector is None:
        return
    seen = run(strategy, sample)
    received = seen.edges().sum(dim=2) > 0
    protected = seen.pivots.gather(seen.protected()) & seen.pivots.filled()
    require_all(~(received & protected), "no token may be merged into a protected pivot")
    alone = ~received & seen.pivots.filled()
    for name in ("keys", "values", "counts"):
        before = seen.pivots.gather(getattr(seen.view, name))[alone]
        require_same(getattr(seen.compressed, name)[alone], before, f"{name} of a pivot that receives nothing")


def counts_conserved(strategy: Strategy, sample: Sample) -> None:
    """A slot stands for its pivot and what is merged into it: kept + merged + evicted are the valid tokens."""
    if strategy.selector is None:
        return
    seen = run(strategy, sample)
    own = seen.pivots.gather(seen.view.counts).masked_fill(~seen.pivots.filled(), 0.0)
    received = torch.einsum("bhts,bht->bhs", seen.edges(), seen.view.counts.double())
    if "merging" not in strategy.merger.gives():
        received = torch.zeros_like(received)
    counts = seen.compressed.counts
    require(counts.dtype == torch.float32, f"counts must be float32, got {counts.dtype}")
    require_close(counts, own + received, 1e-5, "a slot must count its pivot's tokens and those merged into it")
    evicted = (seen.view.counts * (seen.view.valid & ~seen.kept())).sum(dim=-1).double() - received.sum(dim=-1)
    total = counts.sum(dim=-1) + evicted
    require_close(total, seen.view.counts.masked_fill(~seen.view.valid, 0.0).sum(dim=-1), 1e-5, "counts must add up")


def convex_hull(strategy: Strategy, sample: Sample) -> None:
    """No coordinate of a merged slot is outside the range of its members: a mean shrinks and stretches nothing.

    Says nothing about what the merger does not call `convex`.
    """
    if strategy.selector is None:
        return
    seen = run(strategy, sample)
    members = seen.edges() > 0
    for name in sorted(strategy.merger.convex):
        after, low, high = getattr(seen.compressed, name).double(), *_range(seen, getattr(seen.view, name), members)
        slack = _rounding(seen.view) * low.abs().maximum(high.abs())
        inside = (after >= low - slack) & (after <= high + slack)
        require_all(inside | ~seen.pivots.filled()[..., None], f"merged {name} must lie between their members")


def _range(seen: Run, vectors: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest coordinate of each slot's members, `(batch, kv_heads, slots, head_dim)`."""
    own = seen.pivots.gather(vectors).double()
    sources = vectors.double()[:, :, :, None]  # (batch, kv_heads, tokens, 1, head_dim)
    low = sources.masked_fill(~members[..., None], float("inf")).amin(dim=2)
    high = sources.masked_fill(~members[..., None], float("-inf")).amax(dim=2)
    return own.minimum(low), own.maximum(high)


def _rounding(view: LayerView) -> float:
    """Return the relative error of a float32 sum over all tokens, stored in the dtype of the keys."""
    return 4 * torch.finfo(view.keys.dtype).eps + view.shape[2] * torch.finfo(torch.float32).eps


def equal_vectors(strategy: Strategy, sample: Sample) -> None:
    """Equal keys and values merge to themselves. Says nothing about what the merger does not call `convex`."""
    if strategy.selector is None:
        return
    view = view_for(strategy, sample)
    keys, values = (vectors[:, :, -1:].expand_as(vectors) for vectors in (view.keys, view.values))
    seen = run_view(strategy, replace(view, keys=keys, values=values))
    eps, filled = _rounding(view), seen.pivots.filled()
    for name, before in (("keys", keys), ("values", values)):
        if name not in strategy.merger.convex:
            continue
        after = getattr(seen.compressed, name)[filled]
        require_close(after, seen.pivots.gather(before)[filled], eps, f"equal {name} must merge to themselves")


def same_edges(strategy: Strategy, sample: Sample) -> None:
    """Values follow the edges of their keys: where they are equal, they stay equal.

    Says nothing about a merger that does not treat them `alike`.
    """
    if strategy.selector is None or not strategy.merger.alike:
        return
    view = view_for(strategy, sample)
    kept = run_view(strategy, replace(view, values=view.keys.clone())).compressed
    require_same(kept.keys, kept.values, "values must follow the same edges as their keys")
