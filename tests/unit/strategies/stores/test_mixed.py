"""The mixed store against MiKV number by number, and its bytes by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import oracles_quant as oracles
import pytest
import torch
from kvcomp_strategies.observations.query_peaks import QueryPeaks
from kvcomp_strategies.pieces import Coded, Tiered
from kvcomp_strategies.stores.mixed import MixedStore, balancer

from kvcomp import Guide, SlotForm

GROUP, DIM = 2, 6


def head_slots(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and queries of two KV heads with two query heads each."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 2, tokens, DIM), (1, 2, tokens, DIM), (1, 2 * GROUP, tokens, DIM))
    keys, values, queries = (torch.randn(shape, generator=generator) for shape in shapes)
    return keys * torch.tensor([9.0, 1, 1, 1, 0.1, 0]), values, queries


def guide(limit: int, importance: torch.Tensor, queries: torch.Tensor) -> Guide:
    peaks = queries.abs().amax(dim=2)
    return Guide(torch.full((1, 2), limit), importance, {QueryPeaks(): peaks})


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_slots_are_those_of_mikv(tokens: int, bits: int) -> None:
    keys, values, queries = head_slots(tokens)
    importance = torch.rand(1, 2, tokens, generator=torch.Generator().manual_seed(1))
    storage = MixedStore(bits=bits, important=0.3, group=4).open()
    storage.replace(keys, values, None, guide(10**6, importance, queries))
    high = int(tokens * 0.3)
    for h in range(2):
        best = sorted(range(tokens), key=lambda place: -importance[0, h, place].item())[:high]
        group = queries[0, h * GROUP : (h + 1) * GROUP].flatten(0, 1)
        matrices = [tensor.double().tolist() for tensor in (keys[0, h], values[0, h], group)]
        expected = oracles.mikv(*matrices, best, bits, 4)
        for found, wanted in zip(storage.read(), expected, strict=True):
            assert torch.allclose(found[0, h].double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-5)
        assert torch.equal(storage.read()[0][0, h, best], keys[0, h, best])


def test_bytes_are_those_of_the_layout() -> None:
    tokens, high, group = 41, 8, 4
    keys, values, queries = head_slots(tokens)
    storage = MixedStore(bits=2, important=0.2, group=group).open()
    storage.replace(keys, values, None, guide(10**6, torch.zeros(1, 2, tokens), queries))
    low = (tokens - high) * (math.ceil(DIM * 2 / 8) + 2 * math.ceil(DIM / group) * 4)
    assert storage.nbytes() == 2 * (2 * (high * DIM * 4 + low) + math.ceil(tokens / 8) + DIM * 4)


@pytest.mark.parametrize("important_bits", [None, 8])
@pytest.mark.parametrize("tokens", [1, 2, 30, 100])
def test_what_fits_is_within_the_bytes_and_uses_them(tokens: int, important_bits: int | None) -> None:
    store = MixedStore(group=4, important_bits=important_bits)
    keys, values, queries = head_slots(tokens)
    one = SlotForm(1, 1, DIM, DIM, 4)
    least, full = int(store.smallest(torch.tensor(tokens), one)), tokens * one.slot_bytes
    for limit in range(least, full, max((full - least) // 7, 1)):
        storage = store.open()
        storage.replace(keys, values, None, guide(limit, torch.zeros(1, 2, tokens), queries))
        assert storage.nbytes() <= 2 * limit
        enough = important_bits == 8 or tokens < 30 or storage.nbytes() >= 2 * (limit - one.slot_bytes - tokens)
        assert enough


def test_protected_slots_are_precise_first_and_the_latest_of_them() -> None:
    keys, values, queries = head_slots(20)
    importance = torch.zeros(1, 2, 20)
    importance[..., 3] = 5.0
    importance[..., [4, 17, 18]] = float("inf")
    for share, precise in ((0.1, [17, 18]), (0.2, [3, 4, 17, 18]), (0.3, [0, 1, 3, 4, 17, 18])):
        storage = MixedStore(bits=2, important=share, group=4).open()
        storage.replace(keys, values, None, guide(10**6, importance, queries))
        exact = (storage.read()[1] == values).all(dim=-1)
        assert exact[0, 0].nonzero()[:, 0].tolist() == precise


@pytest.mark.parametrize("share", [0.07, 0.14, 0.21, 0.28, 0.29, 0.39, 0.55, 0.58, 0.7])
@pytest.mark.parametrize("tokens", [90, 100, 300])
def test_a_share_of_important_slots_is_the_decimal_as_written(tokens: int, share: float) -> None:
    """And the smallest budget is what the slots then take."""
    keys, values, queries = head_slots(tokens)
    store = MixedStore(bits=2, important=share, group=4)
    form = SlotForm(1, 2, DIM, DIM, 4)
    assert store.setting(tokens, None, form).high == Fraction(str(share)) * tokens // 1
    storage = store.open()
    storage.replace(keys, values, None, guide(10**6, torch.zeros(1, 2, tokens), queries))
    assert storage.nbytes() == int(store.smallest(torch.tensor(tokens), form))


def test_the_balancer_evens_out_queries_and_keys() -> None:
    keys, _, queries = head_slots(30)
    peaks = queries.view(2, -1, DIM).abs().amax(dim=1)
    factor = balancer(peaks, keys[0])[:, 0]
    assert torch.allclose((keys[0].abs().amax(dim=1) * factor)[:, :5], (peaks / factor)[:, :5])
    assert (factor[:, 5] == 1).all()  # keys are 0 there


def test_decoded_slots_are_coded_once_they_are_old_and_share_the_balance() -> None:
    keys, values, queries = head_slots(20)
    storage = MixedStore(bits=2, important=0.2, group=4, recent=4).open()
    storage.replace(keys, values, None, guide(10**6, torch.zeros(1, 2, 20), queries))
    added = [head_slots(1, seed=step) for step in range(1, 12)]
    for key, value, _ in added:
        storage.append(key, value)
    assert torch.equal(storage.read()[0][:, :, -5:], torch.cat([key for key, _, _ in added[-5:]], dim=2))
    prompt, coded, plain = storage.snapshot()[0].runs[0].keys
    assert isinstance(prompt, Tiered)
    assert isinstance(prompt.low, Coded)
    assert isinstance(coded, Coded)
    assert (coded.tokens, plain.tokens) == (6, 5)
    assert coded.balance is prompt.low.balance


def test_without_scores_the_latest_are_precise() -> None:
    keys, values, _ = head_slots(20)
    storage = MixedStore(bits=2, important=0.2, group=4).open()
    storage.replace(keys, values)
    assert torch.equal(storage.read()[1][:, :, 16:], values[:, :, 16:])
