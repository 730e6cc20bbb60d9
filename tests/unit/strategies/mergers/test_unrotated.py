"""Unrotated merging against a naive reference: complex numbers, float64, one slot at a time."""

from __future__ import annotations

import cmath
from dataclasses import replace

import pytest
import torch
from generators import FLOAT32, samples
from hypothesis import given
from hypothesis import strategies as st
from kvcomp_strategies.mergers.mean import Mean
from kvcomp_strategies.mergers.unrotated import Unrotated
from torch import Tensor

import kvcomp
from kvcomp.core.rotary import Rotary
from kvcomp.testing import Sample, make_sample, run, view_for
from kvcomp.testing.runs import run_view


def turned(key: list[float], angles: list[float], sign: int, interleaved: bool, scale: float = 1.0) -> list[float]:
    """Return a key with each pair turned by its angle (or back), a pair being one complex number."""
    pairs, result = len(angles), list(key)
    for pair, angle in enumerate(angles):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)
        point = complex(key[first], key[second]) * scale**sign * cmath.exp(1j * sign * angle)
        result[first], result[second] = point.real, point.imag
    return result


def rotary_of(angles: Tensor, interleaved: bool = False, scale: float = 1.0) -> Rotary:
    return Rotary((angles.cos() * scale).float(), (angles.sin() * scale).float(), interleaved)


def angles_of(sample: Sample, pairs: int, axes: int, seed: int) -> Tensor:
    """Return `(batch, kv_heads, tokens, pairs)`: each pair looks at one of the axes of a random position, as M-RoPE."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 50, (axes, *sample.indices.shape), generator=generator).double()
    frequencies = 10.0 ** -(torch.arange(pairs).double() / pairs)
    return torch.stack([positions[pair % axes] * frequencies[pair] for pair in range(pairs)], dim=-1)


@given(
    sample=samples(dtypes=FLOAT32, fills=("normal",), most_tokens=24),
    axes=st.sampled_from((1, 3)),
    interleaved=st.booleans(),
    partial=st.booleans(),
    scale=st.sampled_from((1.0, 1.3)),
    seed=st.integers(0, 99),
)
def test_keys_are_merged_before_their_embedding_and_turned_to_their_pivot(
    sample: Sample, axes: int, interleaved: bool, partial: bool, scale: float, seed: int
) -> None:
    angles = angles_of(sample, max(1, sample.keys.shape[-1] // (4 if partial else 2)), axes, seed)
    strategy = kvcomp.strategy("flowmm", 0.3, matcher="nearest", merger={"use": "unrotated", "merger": "mean"})
    view = replace(view_for(strategy, sample), rotary=rotary_of(angles, interleaved, scale))
    seen = run_view(strategy, view)
    for row in range(sample.keys.shape[0]):
        for head in range(sample.keys.shape[1]):
            for slot, expected in slots_of(seen, sample, angles, (row, head), interleaved, scale):
                torch.testing.assert_close(
                    seen.compressed.keys[row, head, slot].double(), torch.tensor(expected).double(), rtol=0.0, atol=1e-5
                )


def slots_of(seen, sample, angles, place, interleaved, scale):  # type: ignore[no-untyped-def]
    """Yield each filled slot and its key: every member turned back, their mean, turned to the pivot."""
    edges, keys = seen.edges()[place], sample.keys[place].double().tolist()
    for slot, pivot in enumerate(seen.pivots.indices[place].tolist()):
        if not seen.pivots.filled()[place][slot]:
            continue
        members = [pivot, *edges[:, slot].nonzero().flatten().tolist()]
        back = [turned(keys[m], angles[place][m].tolist(), -1, interleaved, scale) for m in members]
        mean = [sum(column) / len(members) for column in zip(*back, strict=True)]
        yield slot, turned(mean, angles[place][pivot].tolist(), 1, interleaved, scale)


def test_values_and_counts_are_those_of_the_merger_inside() -> None:
    sample = make_sample(3, (30, 18))
    plain = run(kvcomp.strategy("flowmm", 0.3, merger="mean", matcher="nearest"), sample).compressed
    merger = {"use": "unrotated", "merger": {"use": "mean"}}
    unrotated = run(kvcomp.strategy("flowmm", 0.3, merger=merger, matcher="nearest"), sample).compressed
    assert torch.equal(plain.values, unrotated.values)
    assert torch.equal(plain.counts, unrotated.counts)
    assert not torch.allclose(plain.keys, unrotated.keys, atol=1e-2)


def test_values_alone_are_weighed_by_keys_before_their_embedding_too() -> None:
    unrotated = {"use": "unrotated", "merger": {"use": "gaussian"}}
    mergers = [unrotated, {"use": "values-only", "merger": unrotated}, {"use": "values-only", "merger": "gaussian"}]
    both, alone, rotated = (
        run(kvcomp.strategy("flowmm", 0.3, merger=merger, matcher="nearest"), make_sample(3, (30, 18))).compressed
        for merger in mergers
    )
    assert torch.equal(both.values, alone.values)
    assert torch.equal(both.counts, alone.counts)
    assert not torch.allclose(both.values, rotated.values, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_key_that_receives_nothing_keeps_its_bits(dtype: torch.dtype) -> None:
    sample = make_sample(5, (30,), dtype=dtype)
    seen = run(kvcomp.strategy("flowmm", 0.3, merger="unrotated"), sample)
    alone = (seen.edges().sum(dim=2) == 0) & seen.pivots.filled()
    assert alone.any()
    assert torch.equal(seen.compressed.keys[alone], seen.pivots.gather(sample.keys)[alone])


def test_the_largest_half_precision_keys_stay_finite_where_they_are_turned() -> None:
    sample = make_sample(7, (30,), fill="extreme", dtype=torch.float16)
    assert run(kvcomp.strategy("flowmm", 0.3, merger="unrotated"), sample).compressed.keys.isfinite().all()


def test_a_view_that_does_not_say_how_keys_were_rotated_is_refused() -> None:
    strategy = kvcomp.strategy("flowmm", 0.3, merger="unrotated")
    view = replace(view_for(strategy, make_sample(0)), rotary=None)
    with pytest.raises(kvcomp.UnsupportedUseError, match=r"must have `rotary`, a kvcomp\.Rotary"):
        strategy.plan(view)


def test_a_merger_that_merges_nothing_cannot_be_unrotated() -> None:
    with pytest.raises(kvcomp.ConfigError, match=r"merger\.merger: must be a merger that merges, and 'drop' does not"):
        kvcomp.strategy("flowmm", merger={"use": "unrotated", "merger": "drop"})


def test_the_default_merges_as_flowmm_does_and_the_rotation_is_asked_for() -> None:
    assert Unrotated() == kvcomp.strategy("flowmm", merger="unrotated").merger
    assert kvcomp.strategy("flowmm", merger="unrotated").reads_rotary
    assert kvcomp.strategy("flowmm", merger={"use": "values-only", "merger": {"use": "unrotated"}}).reads_rotary
    assert not kvcomp.strategy("flowmm").reads_rotary
    assert Unrotated(merger=Mean()).gives() == Mean().gives()
