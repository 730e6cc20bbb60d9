"""Many runs read at once: their codes are turned into numbers together, and one look-up lays out all slots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomp_strategies.pieces import Coded, Piece, Tiered, once_high_first, read_together
from kvcomp_strategies.quantization import unpack


class Block(NamedTuple):
    """Where a piece stands among the rows that were read: `tokens` of each head, from `start` on, `stride` apart."""

    start: int
    stride: int
    tokens: int


class Placed(NamedTuple):
    """Some heads, places in batch x kv_heads: where their slots stand, the first `replaced` apart from what follows."""

    heads: tuple[int, ...]
    replaced: int
    blocks: tuple[Block, ...]


class Layout(NamedTuple):
    """How slots lie when they are read: `heads`, and of the longest the slots before and after what was appended."""

    heads: int
    replaced: int
    appended: int


def laid_out(runs: Sequence[tuple[tuple[int, ...], int, tuple[Piece, ...]]], layout: Layout) -> Tensor:
    """Return the slots of all runs on one axis, `(heads, slots, dim)`, zeros where a head has none.

    Args:
        runs: of each the heads, how many of its slots come before what was appended, and its pieces.
        layout: of the result.
    """
    leaves = [_leaves(pieces) for _, _, pieces in runs]
    rows, blocks = _rows([leaf for held in leaves for leaf in held])
    standing = iter(blocks)
    placed = tuple(
        Placed(heads, replaced, tuple(next(standing) for _ in held))
        for (heads, replaced, _), held in zip(runs, leaves, strict=True)
    )
    index = _index(placed, layout, rows.device)
    tiers = [(heads, pieces[0]) for heads, _, pieces in runs if isinstance(pieces[0], Tiered)]
    if tiers:
        index = index.view(layout.heads, -1).gather(1, _places(tiers, layout, index)).flatten()
    return rows.index_select(0, index).view(layout.heads, -1, rows.shape[-1])


def _leaves(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """Return the pieces, the two kinds of a tiered one in the first place by themselves."""
    first = pieces[0]
    return (first.high, first.low, *pieces[1:]) if isinstance(first, Tiered) else pieces


def _places(tiers: Sequence[tuple[tuple[int, ...], Tiered]], layout: Layout, like: Tensor) -> Tensor:
    """Return where each slot stands once the high ones of its head come first, `(heads, slots)` int64."""
    tier = like.new_zeros(layout.heads, layout.replaced + layout.appended)
    for heads, piece in tiers:
        tier[list(heads), : piece.tokens] = unpack(piece.tier, 1, piece.tokens).long()
    return once_high_first(tier)


def _rows(pieces: Sequence[Piece]) -> tuple[Tensor, list[Block]]:
    """Return the tokens of all pieces, `(rows, dim)`, the first row 0, and where each piece stands."""
    parts, filled = [pieces[0].room(1)[:1, 0].zero_()], 1
    blocks = [Block(0, 0, 0)] * len(pieces)
    alike: dict[object, list[int]] = defaultdict(list)
    for place, piece in enumerate(pieces):
        if isinstance(piece, Coded):
            alike[piece.quantized.kind].append(place)
            continue
        numbers = piece.read()
        parts.append(numbers.flatten(0, 1))
        blocks[place] = Block(filled, numbers.shape[1], numbers.shape[1])
        filled += len(parts[-1])
    for places in alike.values():
        coded = [piece for place in places if isinstance(piece := pieces[place], Coded)]
        numbers, strides = read_together(coded)
        parts.append(numbers)
        for place, piece, stride in zip(places, coded, strides, strict=True):
            blocks[place] = Block(filled, stride, piece.tokens)
            filled += stride * piece.heads
    return torch.cat(parts), blocks


@lru_cache(maxsize=2)  # keys and values of all layers lie alike in one step
def _index(runs: tuple[Placed, ...], layout: Layout, device: torch.device) -> Tensor:
    """Return the row of every slot, `(heads * slots,)` int64, 0 where a head has none."""
    with torch.inference_mode(mode=False):
        stretches = torch.tensor(_stretches(runs, layout), dtype=torch.int64).T
        lengths, starts, steps = stretches
        before = lengths.cumsum(0) - lengths
        spread = torch.stack([starts - before * steps, steps]).repeat_interleave(lengths, dim=1)
        return (spread[0] + spread[1] * torch.arange(spread.shape[1])).to(device)


def _stretches(runs: Sequence[Placed], layout: Layout) -> list[tuple[int, int, int]]:
    """Return the rows of all slots, head after head, in stretches: how many, the first, and 1 where the others follow
    it; 0 where there is no slot, and row 0 stands for each.
    """
    heads: list[list[tuple[int, int, int]]] = [[] for _ in range(layout.heads)]
    for run in runs:
        gap = (layout.replaced - run.replaced, 0, 0)
        before, after = _parted(run.blocks, run.replaced)
        for number, head in enumerate(run.heads):
            first, rest = (
                [(block.tokens, block.start + number * block.stride, 1) for block in blocks]
                for blocks in (before, after)
            )
            heads[head] = [*first, gap, *rest]
    return [stretch for head in heads for stretch in head]


def _parted(blocks: Sequence[Block], tokens: int) -> tuple[list[Block], list[Block]]:
    """Return the blocks of the first tokens, and those of the others."""
    before, after = [], []
    for block in blocks:
        first = min(tokens, block.tokens)
        tokens -= first
        before += [block._replace(tokens=first)] if first else []
        after += (
            [block._replace(start=block.start + first, tokens=block.tokens - first)] if first < block.tokens else []
        )
    return before, after
