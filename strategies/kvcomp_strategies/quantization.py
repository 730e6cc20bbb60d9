"""Numbers in few bits: packing, asymmetric quantization in groups, sparse outliers, and low-rank corrections.

Everything here works on the last two axes of a tensor, `(..., tokens, dim)`, and computes in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS, CHANNELS = -2, -1  # the axis along which numbers share a scale
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes


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

    def first(self, tokens: int) -> Quantized:
        """Return views of the first tokens, where groups are along `CHANNELS`."""
        assert self.axis == CHANNELS
        codes, scale, zero = (tensor.narrow(-2, 0, tokens) for tensor in (self.codes, self.scale, self.zero))
        return Quantized(codes, scale, zero, self.bits, self.group, self.axis, self.dim)

    @property
    def kind(self) -> tuple[object, ...]:
        """Return what codes must have in common to be read together."""
        return self.bits, self.group, self.axis, self.dim, self.scale.dtype


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes below `2 ** bits`, `(..., dim)` uint8, packed to `(..., ceil(dim * bits / 8))`; the first is lowest.

    >>> pack(torch.tensor([1, 2, 3, 0, 1], dtype=torch.uint8), 2).tolist()
    [57, 1]
    """
    per_byte = 8 // bits
    if missing := -codes.shape[-1] % per_byte:
        codes = F.pad(codes, (0, missing))
    return (_split(codes, per_byte, CHANNELS) << _shifts(bits, codes.device)).sum(dim=-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Return the codes, `(..., dim)` uint8: the inverse of `pack`."""
    if bits == 8:
        return packed[..., :dim]
    codes = _words(bits, packed.device).index_select(0, packed.flatten().int()).view(torch.uint8)
    return codes.view(*packed.shape[:-1], -1)[..., :dim]


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
    half = high.float() / 2 - low.float() / 2  # the whole range could overflow
    scale = _rounded_up(half * (2 / most), numbers.dtype)
    zero = _centred(low, half, scale, most)
    codes = (grouped.float() - zero.float().unsqueeze(axis)).div_(scale.float().unsqueeze(axis))
    codes = codes.round_().clamp_(0, most).to(torch.uint8)
    codes = _out_of_groups(codes, axis, numbers.shape[axis])
    return Quantized(pack(codes, bits), scale, zero, bits, group, axis, numbers.shape[-1])


def dequantize(quantized: Quantized, out: Tensor | None = None) -> Tensor:
    """Return the numbers that codes stand for, `code * scale + zero`, `(..., tokens, dim)` float32.

    Args:
        quantized: the codes.
        out: where the numbers go, of that shape and dtype; by default new memory.
    """
    codes = unpack(quantized.codes, quantized.bits, quantized.dim)
    numbers = codes.float() if out is None else out.copy_(codes)
    axis, group, length = quantized.axis, quantized.group, codes.shape[quantized.axis]
    scale, zero = quantized.scale.float(), quantized.zero.float()
    if whole := length // group:
        grouped = _split(numbers.narrow(axis, 0, whole * group), group, axis)
        grouped.mul_(scale.narrow(axis, 0, whole).unsqueeze(axis)).add_(zero.narrow(axis, 0, whole).unsqueeze(axis))
    if rest := length % group:
        last = numbers.narrow(axis, length - rest, rest)
        last.mul_(scale.narrow(axis, whole, 1)).add_(zero.narrow(axis, whole, 1))
    return numbers


def in_one(several: Sequence[Quantized]) -> tuple[Quantized, list[int]]:
    """Return the codes of several `(heads, tokens, dim)` of one kind, head after head, as if those were the tokens of
    one, `(rows, dim)`, and how many rows a head of each takes: along `TOKENS`, whole groups.
    """
    first = several[0]
    codes = [one.codes if one.axis == CHANNELS else _filled_up(one.codes, one.group) for one in several]
    parts = (codes, [one.scale for one in several], [one.zero for one in several])
    all_codes, scale, zero = (torch.cat([tensor.flatten(0, 1) for tensor in part]) for part in parts)
    joined = Quantized(all_codes, scale, zero, first.bits, first.group, first.axis, first.dim)
    return joined, [part.shape[1] for part in codes]


def finite(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 numbers in another dtype, those beyond its range as its largest."""
    largest = torch.finfo(dtype).max
    return numbers.clamp(-largest, largest).to(dtype)


def limited_(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 numbers, those beyond the range of a dtype set to its largest, in place."""
    largest = torch.finfo(dtype).max
    return numbers.clamp_(-largest, largest)


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

    def put_back_(self, numbers: Tensor) -> Tensor:
        """Return `(..., tokens, dim)` with the outliers where they were, in place."""
        return numbers.scatter_(self.axis, self.places.long(), self.values.to(numbers.dtype))


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


@cache
def _shifts(bits: int, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


@cache
def _words(bits: int, device: torch.device) -> Tensor:
    """Return the codes in every byte, `(256,)`: a word of `8 / bits` bytes each, so that one look-up unpacks a byte."""
    with torch.inference_mode(mode=False):
        codes = (torch.arange(256, device=device)[:, None] >> _shifts(bits, device)) & (2**bits - 1)
        words: Tensor = codes.to(torch.uint8).view(WORDS[8 // bits])[:, 0]
        return words


def _in_groups(numbers: Tensor, group: int, axis: int) -> Tensor:
    """Return the axis as `(groups, group)`, the last group filled up with its last number, which is no new extreme."""
    missing = -numbers.shape[axis] % group
    if missing:
        last = numbers.narrow(axis, numbers.shape[axis] - 1, 1)
        shape = list(last.shape)
        shape[axis] = missing
        numbers = torch.cat([numbers, last.expand(shape)], dim=axis)
    return _split(numbers, group, axis)


def _filled_up(codes: Tensor, group: int) -> Tensor:
    """Return packed codes with zeros up to a whole group of tokens."""
    missing = -codes.shape[1] % group
    return F.pad(codes, (0, 0, 0, missing)) if missing else codes


def _split(numbers: Tensor, group: int, axis: int) -> Tensor:
    shape = list(numbers.shape)
    shape[axis : axis + 1 or None] = [shape[axis] // group, group]
    return numbers.view(shape)


def _out_of_groups(grouped: Tensor, axis: int, length: int) -> Tensor:
    return grouped.flatten(axis - 1, axis).narrow(axis, 0, length)


def _rounded_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a float32 scale in another dtype, not below what it was, at least the smallest normal number."""
    limits = torch.finfo(dtype)
    return (scale * (1 + limits.eps)).clamp(min=limits.tiny, max=limits.max).to(dtype)


def _centred(low: Tensor, half: Tensor, scale: Tensor, most: int) -> Tensor:
    """Return the zero: the smallest number, unless the largest scale of the dtype does not reach over the range, of
    which `half` is given.
    """
    missing = half - scale.float() * (most / 2)
    return (low.float() + missing.clamp(min=0)).to(low.dtype)
