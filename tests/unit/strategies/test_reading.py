"""Runs that are read at once stand where each would stand by itself."""

from __future__ import annotations

import pytest
import torch
from kvcomp_strategies.pieces import Code, Coded, Piece, Plain, Tiered, packed_tier, read_all
from kvcomp_strategies.quantization import CHANNELS, TOKENS
from kvcomp_strategies.reading import Layout, laid_out

HEADS = ((3,), (0, 4), (1, 2))
DIM = 5


def numbers(heads: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(heads, tokens, DIM, generator=generator).to(dtype)


def codes(axis: int, dtype: torch.dtype, bits: int = 2, **extras: float) -> list[tuple[Piece, ...]]:
    """Each run: codes, the last group of keys not full, and a few tokens as they are."""
    code = Code(bits, 4, axis, **extras)  # type: ignore[arg-type]
    return [
        (Coded.of(numbers(len(heads), count, dtype), code), Plain(numbers(len(heads), 3, dtype)))
        for heads, count in zip(HEADS, (6, 8, 3), strict=True)
    ]


def balanced(axis: int, dtype: torch.dtype) -> list[tuple[Piece, ...]]:
    return [
        (Coded.of(numbers(len(heads), 6, dtype), Code(4, 4, axis), numbers(len(heads), 1, torch.float32).abs()),)
        for heads in HEADS
    ]


def tiered(axis: int, dtype: torch.dtype) -> list[tuple[Piece, ...]]:
    runs: list[tuple[Piece, ...]] = []
    for heads in HEADS:
        tier = torch.arange(7).expand(len(heads), 7) % 3 == 1
        low = Coded.of(numbers(len(heads), 5, dtype), Code(4, 4, axis))
        runs.append((Tiered(Plain(numbers(len(heads), 2, dtype)), low, packed_tier(tier)), low))
    return runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("axis", [TOKENS, CHANNELS])
@pytest.mark.parametrize("kind", ["codes", "one bit", "corrected", "balanced", "tiered"])
def test_slots_stand_where_they_stand_alone(kind: str, axis: int, dtype: torch.dtype) -> None:
    runs = {
        "codes": lambda: codes(axis, dtype),
        "one bit": lambda: codes(axis, dtype, bits=1),
        "corrected": lambda: codes(axis, dtype, rank=1, outliers=0.5),
        "balanced": lambda: balanced(axis, dtype),
        "tiered": lambda: tiered(axis, dtype),
    }[kind]()
    alone = [read_all(pieces) for pieces in runs]
    appended = 2
    replaced = [part.shape[1] - appended for part in alone]
    expected = torch.zeros(5, max(replaced) + appended, DIM, dtype=dtype)
    for heads, count, part in zip(HEADS, replaced, alone, strict=True):
        expected[list(heads), :count] = part[:, :count]
        expected[list(heads), max(replaced) :] = part[:, count:]
    found = laid_out(list(zip(HEADS, replaced, runs, strict=True)), Layout(5, max(replaced), appended))
    assert torch.equal(found, expected)
