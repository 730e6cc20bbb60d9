"""Promises of a part by itself, whatever pipeline it is in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from kvcomp.core.attention import observe
from kvcomp.core.interfaces import BudgetAllocator, LayerPolicy, Observation, Part, Store
from kvcomp.core.making import make_part
from kvcomp.core.strategy import Strategy
from kvcomp.core.types import AttentionBlock, Rule
from kvcomp.testing.failures import require, require_all, require_close, require_same
from kvcomp.testing.runs import run, view_for
from kvcomp.testing.samples import Sample

PartPromise = Callable[[Strategy, Part, Sample], None]
LOSS = 0.5  # the largest error of a store, as a share of the range of what it holds


def settings(strategy: Strategy, part: Part, sample: Sample) -> None:
    """A part has a name and a docstring, cannot be changed, refuses unknown fields, and comes back from its dump."""
    require(bool(part.use), "a part must have a `use` name: class MyPart(Scorer, use='my-part')")
    require(bool((type(part).__doc__ or "").strip()), "a part must have a docstring that says what it does")
    document = part.dump()
    require(document.pop("use") == part.use, "the dump of a part must hold its name")
    fields = _fields(part, document)
    again = type(part)(**fields)
    require(again == part, f"a part must come back from its dump, got {document}")
    require(hash(again) == hash(part), "equal parts must have equal hashes")
    try:
        type(part)(**fields | {"no_such_field": 1})
    except ValidationError:
        return
    require(False, "unknown fields must be refused: keep `extra='forbid'`")


def _fields(part: Part, document: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that a dump holds, the parts inside made anew."""
    faults: list[str] = []
    inner = {name: make_part(held.kind, document[name], faults) for name, held in part.part_fields().items()}
    require(not faults, f"the parts inside a part must come back from its dump: {'; '.join(faults)}")
    return document | inner


def legal_plan(strategy: Strategy, part: Part, sample: Sample) -> None:
    """A policy returns one rule, one rho in [0, 1] or NaN, and one positive share per row."""
    if not isinstance(part, LayerPolicy):
        return
    plan = part.plan(view_for(strategy, sample))
    rows = (sample.keys.shape[0],)
    for name in ("rule", "rho", "share"):
        shape = tuple(getattr(plan, name).shape)
        require(shape == rows, f"{name} must have one entry per row, {rows}, got {shape}")
    require(set(plan.rule.tolist()) <= set(map(int, Rule)), f"rule must hold values of Rule, got {plan.rule.tolist()}")
    require_all(plan.rho.isnan() | ((plan.rho >= 0) & (plan.rho <= 1 + 1e-5)), "rho must be in [0, 1], or NaN")
    require_all(plan.share > 0, "share must be positive")


def exact_sum(strategy: Strategy, part: Part, sample: Sample) -> None:
    """An allocator over several layers spends exactly the budget, and no head goes without a slot."""
    if not isinstance(part, BudgetAllocator) or strategy.selector is None:
        return
    layers = 1 if part.scope == "layer" else sample.layers
    seen = run(strategy, sample)
    views, scores = [seen.view] * layers, [seen.scores] * layers
    allotted = seen.strategy.allocate(seen.share, views, scores)
    shape = (layers, *seen.view.shape[:2])
    require(tuple(allotted.shape) == shape, f"slots must be (layers, batch, kv_heads) {shape}, got {allotted.shape}")
    require(allotted.dtype == torch.int64, f"slots must be int64, got {allotted.dtype}")
    held = torch.stack([view.valid.sum(dim=-1) for view in views])
    require_all((allotted >= 1) & (allotted <= held), "every head must get a slot, and none more than it holds")
    wanted = (seen.share * seen.view.shape[1] * layers).minimum(held.sum(dim=(0, 2)))
    if part.use == "uniform":
        wanted = seen.share[:, None].minimum(held).sum(dim=(0, 2))
    require_same(allotted.sum(dim=(0, 2)), wanted, "the slots of all heads and layers must sum to the budget")


def holds_what_it_is_given(strategy: Strategy, part: Part, sample: Sample) -> None:
    """A store returns what was put in, in order, of the dtype that came in, and counts real bytes."""
    if not isinstance(part, Store):
        return
    for reserve in (None, 3):
        storage = part.open(reserve)
        storage.replace(sample.keys, sample.values)
        _holds(storage.read(), (sample.keys, sample.values))
        require(storage.nbytes() > 0, "nbytes must count the bytes that are held")
        for step in range(1, 6):
            storage.append(sample.keys[:, :, :step], sample.values[:, :, :step])
        pieces = [slice(None), *(slice(step) for step in range(1, 6))]
        expected = [torch.cat([t[:, :, piece] for piece in pieces], dim=2) for t in (sample.keys, sample.values)]
        _holds(storage.read(), expected)
        storage.replace(sample.keys[:, :, :1], sample.values[:, :, :1])
        _holds(storage.read(), (sample.keys[:, :, :1], sample.values[:, :, :1]))


def holds_ragged_heads(strategy: Strategy, part: Part, sample: Sample) -> None:
    """A store holds heads that keep different numbers of slots, what is appended to them, and any rows of them."""
    if not isinstance(part, Store):
        return
    batch, kv_heads, slots = sample.keys.shape[:3]
    lengths = 1 + torch.arange(batch * kv_heads).view(batch, kv_heads, 1) * 5 % slots
    mask = torch.arange(slots) < lengths
    storage = part.open()
    storage.replace(sample.keys, sample.values, mask)
    storage.append(sample.keys[:, :, :2], sample.values[:, :, :2])
    filled = torch.cat([mask, torch.ones_like(mask[..., :2])], dim=2)
    expected = [torch.cat([t, t[:, :, :2]], dim=2) for t in (sample.keys, sample.values)]
    _holds(_filled(storage.read(), filled), _filled(expected, filled))
    order = torch.tensor([batch - 1, 0, 0])
    storage.select(order)
    storage.move(sample.keys.device)
    _holds(_filled(storage.read(), filled[order]), _filled([t[order] for t in expected], filled[order]))


def _filled(pair: Any, filled: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values with zeros in empty slots, after a look that these are finite."""
    require_all(pair[0].isfinite() & pair[1].isfinite(), "empty slots must hold something finite")
    return pair[0].masked_fill(~filled[..., None], 0.0), pair[1].masked_fill(~filled[..., None], 0.0)


def _holds(read: tuple[Tensor, Tensor], expected: Any) -> None:
    for name, after, before in zip(("keys", "values"), read, expected, strict=True):
        require(after.shape == before.shape, f"{name}: {tuple(before.shape)} were put in, {tuple(after.shape)} read")
        require(after.dtype == before.dtype, f"{name}: {before.dtype} were put in, {after.dtype} read")
        spread = before.double().amax() - before.double().amin()
        near = (after.double() - before.double()).abs() <= LOSS * spread
        require_all(near, f"{name} must come back near to what was put in")


class _Recorder(Observation, use="recorder"):
    """Every block of the rows that another observation asks for."""

    watched: Any = Field()

    def rows(self, valid: Tensor, modality: Tensor) -> Tensor | None:
        """Return the rows of the other."""
        rows: Tensor | None = self.watched.rows(valid, modality)
        return rows

    def update(self, state: list[AttentionBlock] | None, block: AttentionBlock) -> list[AttentionBlock]:
        """Return all blocks."""
        return [*(state or []), block]

    def result(self, state: Any) -> Any:
        """Return all blocks."""
        return state


def fold(strategy: Strategy, part: Part, sample: Sample) -> None:
    """An observation is a fold: blocks of any size give the same, a row what it gives alone, and it is finite."""
    if not isinstance(part, Observation):
        return
    whole = observe(sample.inputs(), [part])[part]
    require_all(whole.isfinite(), "an observation must be finite")
    require(whole.shape[:2] == sample.queries.shape[:2], "an observation must be (batch, heads, ...)")
    blocks: Any = observe(sample.inputs(), [_Recorder(watched=part)])[_Recorder(watched=part)]
    for size in (1, 3):
        state: Any = None
        for block in blocks:
            for start in range(0, block.rows.shape[1], size):
                state = part.update(state, _rows(block, slice(start, start + size)))
        require_close(part.result(state), whole, 1e-5, f"blocks of {size} rows must give what one block gives")
    for row in range(sample.keys.shape[0]):
        alone = observe(sample.rows([row]).inputs(), [part])[part]
        require_close(alone[0], whole[row], 1e-5, f"row {row} must give what it gives without the others")


def _rows(block: AttentionBlock, rows: slice) -> AttentionBlock:
    return AttentionBlock(
        leading=block.leading[:, :, rows].contiguous(),  # as blocks always are
        rows=block.rows[:, rows],
        row_modality=block.row_modality[:, rows],
        row_valid=block.row_valid[:, rows],
        modality=block.modality,
        valid=block.valid,
        columns=block.columns[:, rows],
        key_columns=block.key_columns,
        queries=block.queries[:, :, rows],
        rotary=None if block.rotary is None else block.rotary.rows(_places(block, rows)),
        scaling=block.scaling,
    )


def _places(block: AttentionBlock, rows: slice) -> Tensor:
    places = torch.arange(block.rows.shape[1])[rows]
    return places.expand(len(block.rows), -1)


PART_PROMISES: dict[str, PartPromise] = {
    "settings": settings,
    "legal-plan": legal_plan,
    "exact-sum": exact_sum,
    "store": holds_what_it_is_given,
    "ragged-store": holds_ragged_heads,
    "fold": fold,
}
