"""Random numbers without a state: a hash of what they belong to, the same in any batch and on any device."""

from __future__ import annotations

from torch import Tensor

WORD = 0xFFFFFFFF
HEADS = 4096  # streams of one layer


def uniform(indices: Tensor, seed: int, layer: int, stream: int | Tensor = 0) -> Tensor:
    """Return a number in [0, 1) for every logical position, of the shape of `indices`, float64: no ties in practice.

    Args:
        indices: logical positions, integers.
        seed: another seed gives other numbers.
        layer: number of the layer.
        stream: which of the layer's streams, below 4096: a number, or a tensor that broadcasts with the indices.
    """
    base = indices.new_full((1,), 0).long() + stream + (seed * 1_000_003 + layer) * HEADS
    key = _mix(base)
    return _mix(_mix(indices.long() ^ key) ^ key).double() / (WORD + 1)


def _mix(state: Tensor) -> Tensor:
    """Return a 32-bit integer hash (two rounds of multiply and xor-shift), in int64 so that no product overflows."""
    state = state & WORD
    for _ in range(2):
        state = ((state >> 16) ^ state) * 0x45D9F3B & WORD
    return (state >> 16) ^ state
