"""Numbers in few bits: packing, asymmetric quantization in groups, sparse outliers, and low-rank corrections.

Everything here works on the last two axes of a tensor, `(..., tokens, dim)`, and computes in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS, CHANNELS = -2, -1  # the axis along which numbers share a scale


@dataclass(frozen=True, eq=False)
class Quantized:
    """Codes with the scale and zero of their groups; `dequantize` reads them.

    Attributes:
        codes: `(..., tokens, ceil(dim * bits / 8))` uint8, packed.
        scale, zero: `(..., groups, dim)` where groups are along `TOKENS`, `(..., tokens, groups)` along `CHANNELS`, in
            the dtype of what was quantized.
        bits: of one code.
        group: numbers that share a scale; the last group may be shorter.
        axis: `TOKENS` or `CHANNELS`.
        dim: channels before packing.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int
    axis: int
    dim: int


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes below `2 ** bits`, `(..., dim)` uint8, packed to `(..., ceil(dim * bits / 8))`; the first is lowest.

    >>> pack(torch.tensor([1, 2, 3, 0, 1], dtype=torch.uint8), 2).tolist()
    [57, 1]
    """
    per_byte = 8 // bits
    padded = _split(F.pad(codes, (0, -codes.shape[-1] % per_byte)), per_byte, CHANNELS)
    return (padded << _shifts(bits, codes.device)).sum(dim=-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Return the codes, `(..., dim)` uint8: the inverse of `pack`."""
    codes: Tensor = (packed[..., None] >> _shifts(bits, packed.device)) & (2**bits - 1)
    return codes.flatten(-2)[..., :dim]


def row_bytes(dim: int, bits: int) -> int:
    """Return the bytes of one packed row of `dim` codes."""
    return -(-dim * bits // 8)


def quantize(numbers: Tensor, bits: int, group: int, axis: int) -> Quantized:
    """Return the codes of `(..., tokens, dim)`: `round((x - zero) / scale)`, `zero = min`, `scale = (max - min) / n`.

    The scale and zero of every group of `group` numbers along `axis` are kept in the dtype of the numbers, so that
    zero is exact; `n = 2 ** bits - 1`. Follows KIVI (jy-yuan/KIVI, `quant/new_pack.py`), Eq. 1 of arXiv:2402.02750.
    Deviations: the scale is rounded up, so that the error is never above half of it, and is never below the smallest
    normal number, so that a group of equal numbers is exact; codes are computed with the scale as it is stored; a last
    group may be shorter.
    """
    most = 2**bits - 1
    grouped = _in_groups(numbers, group, axis)
    low, high = torch.aminmax(grouped, dim=axis)
    scale = _rounded_up((high.float() / 2 - low.float() / 2) * (2 / most), numbers.dtype)  # halves never overflow
    zero = _centred(low, high, scale, most)
    codes = (grouped.float() - zero.float().unsqueeze(axis)) / scale.float().unsqueeze(axis)
    codes = codes.round_().clamp_(0, most).to(torch.uint8)
    codes = _out_of_groups(codes, axis, numbers.shape[axis])
    return Quantized(pack(codes, bits), scale, zero, bits, group, axis, numbers.shape[-1])


def dequantize(quantized: Quantized) -> Tensor:
    """Return the numbers that codes stand for, `code * scale + zero`, `(..., tokens, dim)` float32."""
    codes = unpack(quantized.codes, quantized.bits, quantized.dim)
    axis, length = quantized.axis, codes.shape[quantized.axis]
    grouped = _in_groups(codes, quantized.group, axis).float()
    numbers = grouped.mul_(quantized.scale.float().unsqueeze(axis)).add_(quantized.zero.float().unsqueeze(axis))
    return _out_of_groups(numbers, axis, length)


def finite(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 numbers in another dtype, those beyond its range as its largest."""
    largest = torch.finfo(dtype).max
    return numbers.clamp(-largest, largest).to(dtype)


@dataclass(frozen=True, eq=False)
class Outliers:
    """Numbers that are kept as they are.

    Attributes:
        places: along `axis`, `(..., count, dim)` or `(..., tokens, count)`; int32 along tokens, uint8 or int32 along
            channels.
        values: the numbers, of the same shape.
        axis: `TOKENS` or `CHANNELS`.
    """

    places: Tensor
    values: Tensor
    axis: int

    def put_back(self, numbers: Tensor) -> Tensor:
        """Return `(..., tokens, dim)` with the outliers where they were."""
        return numbers.scatter(self.axis, self.places.long(), self.values.to(numbers.dtype))


def place_dtype(length: int, axis: int) -> torch.dtype:
    """Return the dtype in which places along an axis are kept."""
    return torch.uint8 if axis == CHANNELS and length <= 256 else torch.int32


def split_outliers(numbers: Tensor, share: float, axis: int) -> tuple[Tensor, Outliers | None]:
    """Return the numbers with outliers replaced by their vector's mean, and the outliers; None where there are none.

    The largest and the smallest `share / 2` of each vector along `axis`, rounded down; equal ones go to the earlier.
    Follows GEAR (opengear-project/GEAR, `GEARLM/Simulated/compress_function.py`; arXiv:2403.05527).
    """
    length = numbers.shape[axis]
    count = outlier_pairs(length, share)
    if not count:
        return numbers, None
    order = numbers.argsort(dim=axis, stable=True)
    ends = torch.cat([order.narrow(axis, 0, count), order.narrow(axis, length - count, count)], dim=axis)
    outliers = Outliers(ends.to(place_dtype(length, axis)), numbers.gather(axis, ends), axis)
    inner = order.narrow(axis, count, length - 2 * count) if length > 2 * count else order
    mean = (numbers.float() / inner.shape[axis]).gather(axis, inner).sum(dim=axis, keepdim=True)
    return numbers.scatter(axis, ends, mean.to(numbers.dtype).expand_as(ends)), outliers


def outlier_pairs(length: int, share: float) -> int:
    """Return how many of the largest, and as many of the smallest, a vector gives up."""
    return int(length * share / 2)


def low_rank(errors: Tensor, rank: int, rounds: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return factors `(..., tokens, rank)` and `(..., rank, dim)` whose product is near to `(..., tokens, dim)`.

    Power iteration from a seeded start that all matrices share, so that a head gets in any batch what it gets alone.
    Follows GEAR (opengear-project/GEAR, `GEARLM/Simulated/compress_function.py`). Deviation: the bases are made
    orthonormal in every round, not in the last alone, and the errors scaled to 1, so that nothing overflows.

    >>> left, right = low_rank(torch.outer(torch.arange(5.0), torch.ones(4))[None], rank=1)
    >>> (left @ right)[0, 2].round(decimals=4).tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    rank = min(rank, *errors.shape[-2:])
    largest = errors.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = errors / largest
    start = torch.randn(errors.shape[-1], rank, generator=torch.Generator().manual_seed(seed))
    right = start.to(errors.device).expand(*errors.shape[:-2], -1, -1)
    left = scaled @ right
    for _ in range(rounds):
        left = torch.linalg.qr(scaled @ torch.linalg.qr(right).Q).Q
        right = scaled.mT @ left
    return left, right.mT * largest


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def _in_groups(numbers: Tensor, group: int, axis: int) -> Tensor:
    """Return the axis as `(groups, group)`, the last group filled up with its last number, which is no new extreme."""
    missing = -numbers.shape[axis] % group
    if missing:
        last = numbers.narrow(axis, numbers.shape[axis] - 1, 1)
        shape = list(last.shape)
        shape[axis] = missing
        numbers = torch.cat([numbers, last.expand(shape)], dim=axis)
    return _split(numbers, group, axis)


def _split(numbers: Tensor, group: int, axis: int) -> Tensor:
    shape = list(numbers.shape)
    shape[axis : axis + 1 or None] = [shape[axis] // group, group]
    return numbers.reshape(shape)


def _out_of_groups(grouped: Tensor, axis: int, length: int) -> Tensor:
    return grouped.flatten(axis - 1, axis).narrow(axis, 0, length)


def _rounded_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a float32 scale in another dtype, not below what it was, at least the smallest normal number."""
    limits = torch.finfo(dtype)
    return (scale * (1 + limits.eps)).clamp(min=limits.tiny, max=limits.max).to(dtype)


def _centred(low: Tensor, high: Tensor, scale: Tensor, most: int) -> Tensor:
    """Return the zero: the smallest number, unless the largest scale of the dtype does not reach the largest number."""
    missing = high.float() / 2 - low.float() / 2 - scale.float() * (most / 2)
    return (low.float() + missing.clamp(min=0)).to(low.dtype)
