"""What is kept: how many, which, and in which order."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvcomp.core.budget import Budget
from kvcomp.core.strategy import Strategy
from kvcomp.core.types import LayerView, Scores
from kvcomp.testing.failures import require, require_all, require_same
from kvcomp.testing.runs import run, run_view, view_for
from kvcomp.testing.samples import Sample


def exact_slots(strategy: Strategy, sample: Sample) -> None:
    """Each head keeps what it was allotted; the sum over heads is the budget, as far as the heads hold so many.

    A store that evicts down to the bytes has a share of its own.
    """
    if strategy.selector is None:
        return
    seen = run(strategy, sample)
    held = seen.view.valid.sum(dim=-1)
    share = _share(seen.strategy.budget, held.amax(dim=-1))
    if share is not None and not strategy.store.evicts:
        require_same(seen.share, share, "the uniform share must be max(1, floor(ratio * tokens)) of each row")
    require_all((seen.slots >= 1) & (seen.slots <= held), "a head must be allotted 1 slot to as many as it holds")
    if strategy.allocator.scope == "layer":
        wanted = (seen.share * seen.view.shape[1]).minimum(held.sum(dim=-1))
        reach = seen.share[:, None].minimum(held).sum(dim=-1) if strategy.allocator.use == "uniform" else wanted
        require_same(seen.slots.sum(dim=-1), reach, "the slots of a layer's heads must sum to the budget")
    filled = seen.pivots.filled()
    require_same(filled.sum(dim=-1), seen.slots, "a head must keep exactly the slots it was allotted")
    require(bool((filled.long().diff(dim=-1) <= 0).all()), "the empty slots of a head must be its last")


def _share(budget: Budget, tokens: Tensor) -> Tensor | None:
    """Return max(1, floor(ratio * tokens)) in whole numbers; None for a budget that is no ratio."""
    if budget.ratio is None:
        return None
    up, down = budget.ratio.as_integer_ratio()
    return torch.tensor([max(1, up * count // down) for count in tokens.tolist()])


def sorted_pivots(strategy: Strategy, sample: Sample) -> None:
    """Pivots are ascending, unique, on the token axis, and never a pad or an empty slot."""
    if strategy.selector is None:
        return
    seen = run(strategy, sample)
    indices, filled = seen.pivots.indices, seen.pivots.filled()
    tokens = seen.view.shape[2]
    require(indices.dtype == torch.int64, f"pivots must be int64, got {indices.dtype}")
    require_all((indices >= 0) & (indices < tokens), f"pivots must lie in 0..{tokens - 1}")
    require_all((indices.diff(dim=-1) > 0) | ~filled[..., 1:], "pivots must be ascending and unique")
    require_all(seen.view.valid.gather(2, indices) | ~filled, "pivots must be valid tokens")
    kept = seen.compressed.indices
    require_all((kept == -1) == ~filled, "the logical index must be -1 in empty slots, and only there")
    require_all((kept.diff(dim=-1) > 0) | ~filled[..., 1:], "logical indices must be ascending")


def earlier_ties(strategy: Strategy, sample: Sample) -> None:
    """The best scores are kept, and equal scores go to the earlier token.

    Says nothing about a selector that does not go `by_score`.
    """
    if strategy.selector is None or not strategy.selector.by_score:
        return
    seen = run(strategy, sample)
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(3, seen.view.shape, generator=generator).float()
    free = seen.view.valid & ~seen.protected()
    kept = _kept(strategy, seen.view, Scores(values, seen.protected()), seen.slots)
    _require_best(values, kept, free, "no token may stay while one of a higher score goes")
    for level in range(3):
        here = free & (values == level)
        skipped = (here & ~kept).cumsum(dim=-1) > 0
        require_all(~(skipped & here & kept), "of equal scores the earlier token must stay")


def higher_tiers(strategy: Strategy, sample: Sample) -> None:
    """A token of a higher tier is kept before all of a lower one, whatever their scores.

    Says nothing about a selector that does not go `by_score`.
    """
    if strategy.selector is None or not strategy.selector.by_score:
        return
    seen = run(strategy, sample)
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(seen.view.shape, generator=generator)
    tiers = torch.randint(3, seen.view.shape, generator=generator, dtype=torch.int16)
    kept = _kept(strategy, seen.view, Scores(values, seen.protected(), tiers), seen.slots)
    free = seen.view.valid & ~seen.protected()
    _require_best(tiers, kept, free, "no token may stay while one of a higher tier goes")


def _kept(strategy: Strategy, view: LayerView, scores: Scores, slots: Tensor) -> Tensor:
    assert strategy.selector is not None
    pivots = strategy.selector.select(view, scores, slots)
    tokens = scores.values.shape[2]
    kept = torch.zeros(*scores.values.shape[:2], tokens + 1, dtype=torch.bool)
    return kept.scatter_(2, pivots.indices.masked_fill(~pivots.filled(), tokens), True)[..., :tokens]


def _require_best(values: Tensor, kept: Tensor, free: Tensor, seen: str) -> None:
    """Raise where a head gives up a token with a higher value than one that it keeps."""
    worst = values.masked_fill(~(kept & free), 3).amin(dim=-1)
    best = values.masked_fill(kept | ~free, -1).amax(dim=-1)
    require_all(worst >= best, seen)


def protected_stay(strategy: Strategy, sample: Sample) -> None:
    """What the scorer protects is kept; where it protects more than the slots, the latest of it."""
    if strategy.selector is None:
        return
    seen = run(strategy, sample)
    require_all(seen.kept() | ~seen.protected(), "a protected token must stay")


def all_kept(strategy: Strategy, sample: Sample) -> None:
    """A budget of 1.0 keeps everything: the same keys, values, indices and counts, bit for bit."""
    whole = replace(strategy, budget=Budget.parse(1.0))
    view = view_for(whole, sample)
    kept = run_view(whole, view).compressed
    filled = kept.mask if kept.mask is not None else torch.ones_like(kept.indices, dtype=torch.bool)
    for name in ("indices", "counts", "modality", "keys", "values"):
        before, after = getattr(view, name), getattr(kept, name)
        require(after.dtype == before.dtype, f"{name}: {before.dtype} became {after.dtype} at a budget of 1.0")
        require_same(after[filled], before[view.valid], f"{name} must stay as they are at a budget of 1.0")
