"""Packing, quantization in groups, outliers and low-rank corrections, against loops in float64."""

from __future__ import annotations

import oracles_quant as oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvcomp_strategies.quantization import (
    CHANNELS,
    TOKENS,
    dequantize,
    finite,
    low_rank,
    outlier_pairs,
    pack,
    quantize,
    row_bytes,
    split_outliers,
    unpack,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = (1, 2, 4, 8)
FILLS = ("normal", "extreme", "zero", "equal", "offset", "tiny")


def numbers(fill: str, dtype: torch.dtype, tokens: int = 37, dim: int = 10, seed: int = 0) -> torch.Tensor:
    """`(2, tokens, dim)`."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, tokens, dim, generator=generator)
    largest = torch.finfo(dtype).max if dtype == torch.float16 else 1e15
    wild = torch.where(torch.rand(2, tokens, 1, generator=generator) < 0.5, normal.sign() * largest, normal / largest)
    fills = {
        "normal": normal,
        "extreme": wild,
        "zero": normal * 0,
        "equal": normal[:, :1, :1].expand(2, tokens, dim),
        "offset": normal + 1000,
        "tiny": normal * 1e-7,
    }
    return fills[fill].to(dtype)


def spread(scale: torch.Tensor, group: int, axis: int, length: int) -> torch.Tensor:
    return scale.double().repeat_interleave(group, dim=axis).narrow(axis, 0, length)


@given(st.data(), st.sampled_from(BITS), st.integers(1, 20))
def test_packed_codes_come_back(data: st.DataObject, bits: int, dim: int) -> None:
    row = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=dim, max_size=dim))
    packed = pack(torch.tensor([row], dtype=torch.uint8), bits)
    assert packed.shape == (1, row_bytes(dim, bits))
    assert packed.dtype == torch.uint8
    assert unpack(packed, bits, dim).tolist() == [row]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [TOKENS, CHANNELS])
@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_at_most_half_the_scale(bits: int, axis: int, dtype: torch.dtype, fill: str) -> None:
    for tokens, dim, group in ((37, 10, 8), (1, 10, 8), (8, 8, 8), (9, 16, 32)):
        given_numbers = numbers(fill, dtype, tokens, dim)
        coded = quantize(given_numbers, bits, group, axis)
        read = dequantize(coded).double()
        scale = spread(coded.scale, group, axis, given_numbers.shape[axis])
        rounding = 4 * torch.finfo(torch.float32).eps * (given_numbers.double().abs() + scale * 2**bits)
        assert read.isfinite().all()
        assert ((read - given_numbers.double()).abs() <= scale / 2 + rounding).all()
        assert coded.scale.dtype == coded.zero.dtype == dtype


@pytest.mark.parametrize("axis", [TOKENS, CHANNELS])
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_those_of_the_formula(bits: int, axis: int) -> None:
    for seed, tokens, dim, group in ((0, 37, 10, 8), (1, 5, 12, 4), (2, 64, 16, 32), (3, 1, 3, 2)):
        matrix = numbers("normal", torch.float32, tokens, dim, seed)
        found = quantize(matrix, bits, group, axis)
        codes = unpack(found.codes, bits, dim)
        for head in range(2):
            rows = matrix[head].double().T if axis == TOKENS else matrix[head].double()
            coded, scales = (t[head].T if axis == TOKENS else t[head] for t in (codes, found.scale.double()))
            for row, coded_row, scale_row in zip(rows.tolist(), coded.tolist(), scales.tolist(), strict=True):
                for place, start in enumerate(range(0, len(row), group)):
                    expected, scale, low = oracles.codes(row[start : start + group], bits)
                    assert scale_row[place] == pytest.approx(scale, rel=1e-6, abs=1e-30)
                    for x, code, wanted in zip(row[start:], coded_row[start : start + group], expected, strict=False):
                        tie = scale > 0 and abs(((x - low) / scale) % 1 - 0.5) < 1e-4  # float32 may fall either way
                        assert code == wanted or (tie and abs(code - wanted) == 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_of_half_precision_follow_the_scale_as_it_is_stored(dtype: torch.dtype) -> None:
    matrix = numbers("normal", dtype)
    found = quantize(matrix, 2, 8, TOKENS)
    scale, zero = (spread(t, 8, TOKENS, 37) for t in (found.scale, found.zero))
    expected = ((matrix.double() - zero) / scale).round().clamp(0, 3)
    assert torch.equal(unpack(found.codes, 2, 10).double(), expected)
    assert torch.equal(found.zero[:, 0], matrix[:, :8].amin(dim=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_coding_again_what_was_read_changes_no_code(bits: int, dtype: torch.dtype) -> None:
    for fill in FILLS:
        first = quantize(numbers(fill, dtype), bits, 8, CHANNELS)
        again = quantize(finite(dequantize(first), dtype), bits, 8, CHANNELS)
        assert torch.equal(first.codes, again.codes)


@pytest.mark.parametrize("fill", ["zero", "equal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_of_equal_numbers_is_exact(dtype: torch.dtype, fill: str) -> None:
    for axis in (TOKENS, CHANNELS):
        same = numbers(fill, dtype)
        assert torch.equal(dequantize(quantize(same, 2, 8, axis)).to(dtype), same)


def test_rows_do_not_depend_on_each_other() -> None:
    matrix = numbers("normal", torch.float32)
    whole, alone = quantize(matrix, 2, 8, TOKENS), quantize(matrix[1:], 2, 8, TOKENS)
    assert torch.equal(whole.codes[1:], alone.codes)
    assert torch.equal(whole.scale[1:], alone.scale)


@pytest.mark.parametrize("axis", [TOKENS, CHANNELS])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 0.99])
def test_outliers_are_the_ends_of_each_vector(axis: int, share: float) -> None:
    matrix = numbers("normal", torch.float32, 40, 24)
    inner, outliers = split_outliers(matrix, share, axis)
    length = matrix.shape[axis]
    if not outlier_pairs(length, share):
        assert outliers is None
        assert inner is matrix
        return
    assert outliers is not None
    assert torch.equal(outliers.put_back_(inner.clone()), matrix)
    vectors = [(m.T if axis == TOKENS else m).tolist() for m in (matrix[0].double(), inner[0].double())]
    places = outliers.places[0].long()
    kept = places.T if axis == TOKENS else places
    for before, after, seen in zip(*vectors, kept.tolist(), strict=True):
        expected, ends = oracles.without_outliers(before, share)
        assert after == pytest.approx(expected, abs=1e-5)
        assert sorted(ends) == sorted(seen)


def test_a_correction_of_full_rank_is_exact_and_a_smaller_one_nearly_the_best() -> None:
    errors = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(0))
    left, right = low_rank(errors, 6)
    assert torch.allclose(left @ right, errors, atol=1e-5)
    left, right = low_rank(errors, 2)
    best = torch.linalg.svdvals(errors)[:, 2:].square().sum(-1).sqrt()
    assert ((left @ right - errors).norm(dim=(1, 2)) <= 1.2 * best).all()


@pytest.mark.parametrize("rank", [1, 2, 4, 9])
def test_a_correction_is_that_of_the_loop(rank: int) -> None:
    errors = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(rank))
    left, right = low_rank(errors, rank)
    for head in range(2):
        assert torch.allclose((left @ right)[head].double(), oracles.low_rank(errors[head].double(), rank), atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e15])
def test_a_correction_of_any_size_is_finite(scale: float) -> None:
    left, right = low_rank(scale * torch.ones(2, 7, 5), 3)
    assert left.isfinite().all()
    assert torch.allclose(left @ right, scale * torch.ones(2, 7, 5), rtol=1e-4)


def test_numbers_beyond_a_dtype_become_its_largest() -> None:
    assert finite(torch.tensor([1e9, -1e9, 1.0]), torch.float16).tolist() == [65504.0, -65504.0, 1.0]
