"""What must not matter: the order of rows and heads, the rest of the batch, the time of day."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from kvcomp.core.composition import working
from kvcomp.core.strategy import Strategy
from kvcomp.core.types import CompressedLayer
from kvcomp.testing.failures import require, require_all, require_close, require_same
from kvcomp.testing.runs import Run, run, run_view, view_for
from kvcomp.testing.samples import Sample

FIELDS = ("keys", "values", "indices", "counts", "modality")


def unchanged_inputs(strategy: Strategy, sample: Sample) -> None:
    """No stage changes a tensor that it was given."""
    view = view_for(strategy, sample)
    tensors = _tensors(view) | {f"observation {seen.use}": value for seen, value in view.observations.items()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    seen = run_view(strategy, view)
    for name, tensor in tensors.items():
        require_same(tensor, before[name], f"{name} of the view must not be changed")
    if strategy.selector is not None:
        planned = _tensors(seen.pivots) | _tensors(seen.assignment)
        copies = {name: tensor.clone() for name, tensor in planned.items()}
        strategy.apply(view, seen.plan)
        for name, tensor in planned.items():
            require_same(tensor, copies[name], f"{name} of the plan must not be changed by applying it")


def _tensors(holder: Any) -> dict[str, Tensor]:
    values = {field.name: getattr(holder, field.name) for field in fields(holder)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def same_bits(strategy: Strategy, sample: Sample) -> None:
    """The same input gives the same bits, and planning in one call what planning stage by stage gives."""
    first, second = run(strategy, sample), run(strategy, sample)
    for name in FIELDS:
        require_same(getattr(second.compressed, name), getattr(first.compressed, name), f"{name} of a second run")
    if strategy.allocator.scope == "layer":
        view = first.view
        whole = strategy.apply(view, strategy.plan(view))
        for name in FIELDS:
            require_same(getattr(whole, name), getattr(first.compressed, name), f"{name}, planned in one call")


def finite(strategy: Strategy, sample: Sample) -> None:
    """Finite inputs give finite scores, keys and values, of the dtype that came in."""
    seen = run(strategy, sample)
    require_all(seen.scores.values.isfinite(), "scores must be finite")
    if strategy.scorer is not None and strategy.scorer in working(strategy.parts):
        raw = strategy.scorer.score(seen.view, seen.share)
        require(raw.shape == seen.view.shape, f"scores must be {seen.view.shape}, got {tuple(raw.shape)}")
        require_all(raw.isfinite() | ~seen.view.valid, "scores of valid tokens must be finite")
    for name in ("keys", "values", "counts"):
        after, before = getattr(seen.compressed, name), getattr(seen.view, name)
        require(after.dtype == before.dtype, f"{name} must stay {before.dtype}, got {after.dtype}")
        require_all(after.isfinite(), f"{name} must be finite")


def permuted_rows(strategy: Strategy, sample: Sample) -> None:
    """Another order of the rows of a batch gives the same result in that order."""
    order = list(range(sample.keys.shape[0]))[::-1]
    one, other = run(strategy, sample), run(strategy, sample.rows(order))
    _same_result(one, other, lambda kept: kept[order], "rows in another order")
    require_close(one.plan.rho[order], other.plan.rho, 1e-5, "rho with rows in another order")


def permuted_heads(strategy: Strategy, sample: Sample) -> None:
    """Another order of the KV heads gives the same result in that order.

    Says nothing about a scorer that tells equal heads apart: one that depends on the head's number, as `random` does.
    """
    if _tells_heads_apart(strategy, sample):
        return
    order = list(range(sample.keys.shape[1]))[::-1]
    one, other = run(strategy, sample), run(strategy, sample.heads(order))
    _same_result(one, other, lambda kept: kept[:, order], "heads in another order")
    require_close(one.plan.rho, other.plan.rho, 1e-5, "rho with heads in another order")


def _tells_heads_apart(strategy: Strategy, sample: Sample) -> bool:
    twice = sample.heads([0, 0])
    scores = run(strategy, twice).scores.values
    return not bool(torch.isclose(scores[:, 0], scores[:, 1]).all())


def row_alone(strategy: Strategy, sample: Sample) -> None:
    """A row keeps in a batch, behind padding, what it keeps alone: the same indices and counts, and the same rho."""
    together = run(strategy, sample)
    for row in range(sample.keys.shape[0]):
        alone = run(together.strategy, sample.alone(row))
        kept, lone = together.compressed, alone.compressed
        inside = kept.mask[row] if kept.mask is not None else torch.ones_like(kept.indices[row], dtype=torch.bool)
        whole = lone.mask[0] if lone.mask is not None else torch.ones_like(lone.indices[0], dtype=torch.bool)
        for name in ("indices", "modality"):
            seen = getattr(kept, name)[row][inside]
            require_same(getattr(lone, name)[0][whole], seen, f"{name} of row {row}, alone and in the batch")
        require_close(lone.counts[0][whole], kept.counts[row][inside], 1e-5, f"counts of row {row}, alone")
        require_close(alone.plan.rho, together.plan.rho[row : row + 1], 1e-5, f"rho of row {row}, alone")


def _same_result(one: Run, other: Run, permute: Any, seen: str) -> None:
    eps = 8 * torch.finfo(one.view.keys.dtype).eps
    for name in FIELDS:
        before, after = permute(_unpadded(one.compressed, name)), _unpadded(other.compressed, name)
        if name in ("keys", "values"):
            require_close(after, before, eps, f"{name} with {seen}")
        else:
            require_same(after, before, f"{name} with {seen}")


def _unpadded(kept: CompressedLayer, name: str) -> Tensor:
    """Return a field with zeros in its empty slots."""
    value: Tensor = getattr(kept, name)
    if kept.mask is None:
        return value
    empty = ~kept.mask if value.dim() == 3 else ~kept.mask[..., None]
    return value.masked_fill(empty, 0)
