"""How many slots fit in the bytes of a budget where the store makes slots smaller."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kvcomp.core.budget import Budget
from kvcomp.core.errors import BudgetError
from kvcomp.core.interfaces import Store
from kvcomp.core.types import SlotForm


def affordable_slots(budget: Budget, store: Store, tokens: Tensor, form: SlotForm, *, even: bool) -> Tensor:
    """Return the most slots that the store can hold in the budget's bytes, `(batch,)` int64 on the CPU, at least 1.

    Args:
        budget: what may be kept.
        store: makes slots smaller.
        tokens: valid tokens of each row, `(batch,)` int64 on the CPU.
        form: of the slots.
        even: whether all heads keep the same number; if not, the bytes are enough however the slots are divided.

    Raises:
        BudgetError: a number of bytes that does not pay for one slot.
    """
    counts = torch.arange(1, int(tokens.max()) + 1)
    sizes = store.smallest(counts, form)
    full = form.heads * form.slot_bytes
    rows = []
    for most, room in zip(tokens.tolist(), budget.nbytes(tokens, full).tolist(), strict=True):
        needed = sizes[:most] if even else concave(sizes[:most])
        rows.append((counts[:most] * (needed <= room)).max())
    slots = torch.stack(rows)
    if budget.bytes is not None and not budget.or_smallest and int(slots.min()) == 0:
        raise BudgetError(
            f"a budget of {budget.bytes} bytes is below one slot per KV head and layer, which takes "
            f"{int(sizes[0])} bytes in this model; ask for at least that",
            smallest=smallest_ratio(sizes[0], tokens.min() * full),
        )
    return slots.clamp(min=1)


def smallest_ratio(needed: Tensor, whole: Tensor) -> float:
    """Return the share that some bytes are of the whole, rounded up to six decimals; both 0-d integers.

    >>> smallest_ratio(torch.tensor(1), torch.tensor(3))
    0.333334
    """
    return -(-int(needed) * 10**6 // int(whole)) / 10**6


def concave(sizes: Tensor) -> Tensor:
    """Return the most that heads of 1, 2, ... slots can take on average, if `sizes` `(slots,)` is what a head takes.

    This is the least concave majorant: however a number of slots is divided among heads, their mean size is below it.

    >>> concave(torch.tensor([1, 5, 6, 7])).tolist()
    [3, 5, 6, 7]
    """
    hull = [(0, 0)]
    for count, size in enumerate(sizes.tolist(), start=1):
        while len(hull) > 1 and _below(hull[-2], hull[-1], (count, size)):
            hull.pop()
        hull.append((count, size))
    steps = [
        low + -((low - high) * (place - start) // (end - start))  # rounded up
        for (start, low), (end, high) in itertools.pairwise(hull)
        for place in range(start + 1, end + 1)
    ]
    return torch.tensor(steps)


def _below(first: tuple[int, int], middle: tuple[int, int], last: tuple[int, int]) -> bool:
    """Return whether the middle point is not above the line between the others."""
    rise, run = last[1] - first[1], last[0] - first[0]
    return (middle[1] - first[1]) * run <= rise * (middle[0] - first[0])
