"""The quantized store against KIVI and GEAR number by number, its bytes by hand, and what decoding does to it."""

from __future__ import annotations

import math

import oracles_quant as oracles
import pytest
import torch
from kvcomp_strategies.pieces import Coded
from kvcomp_strategies.stores.quantized import QuantizedStore
from pydantic import ValidationError

from kvcomp import Guide, SlotForm

BATCH, HEADS, KEY_DIM, VALUE_DIM = 2, 2, 6, 10


def slots(tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, HEADS, tokens)
    keys, values = (torch.randn(*shape, dim, generator=generator) for dim in (KEY_DIM, VALUE_DIM))
    return keys.to(dtype), values.to(dtype)


def guide(limit: int, tokens: int) -> Guide:
    """Each head may take so many bytes."""
    return Guide(torch.full((BATCH, HEADS), limit), torch.zeros(BATCH, HEADS, tokens))


def form(dtype: torch.dtype = torch.float32) -> SlotForm:
    return SlotForm(1, HEADS, KEY_DIM, VALUE_DIM, dtype.itemsize)


def double(tensor: torch.Tensor) -> list[list[float]]:
    return tensor.double().tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 15, 16, 17, 40])
def test_a_prompt_and_what_is_decoded_are_those_of_kivi(tokens: int, bits: int) -> None:
    storage = QuantizedStore(bits=bits, group=4, residual=8).open()
    keys, values = slots(tokens)
    storage.replace(keys, values)
    heads = [
        [oracles.Kivi(double(keys[b, h]), double(values[b, h]), bits, 4, 8) for h in range(HEADS)] for b in range(BATCH)
    ]
    for step in range(20):
        key, value = slots(1, seed=step + 1)
        storage.append(key, value)
        seen_keys, seen_values = storage.read()
        for b in range(BATCH):
            for h in range(HEADS):
                expected = heads[b][h].decode(double(key[b, h])[0], double(value[b, h])[0])
                for found, wanted in zip((seen_keys[b, h], seen_values[b, h]), expected, strict=True):
                    wrong = (found.double() - torch.tensor(wanted, dtype=torch.float64)).abs() > 1e-5
                    assert not wrong.any(), step


@pytest.mark.parametrize("rank", [0, 2])
def test_a_prompt_is_that_of_gear(rank: int) -> None:
    storage = QuantizedStore(bits=2, group=4, residual=8, window="block", rank=rank, outliers=0.25).open()
    keys, values = slots(29)
    storage.replace(keys, values)
    for found, given, along_tokens in zip(storage.read(), (keys, values), (True, False), strict=True):
        for b in range(BATCH):
            for h in range(HEADS):
                coded = oracles.gear(double(given[b, h, :24]), 2, 4, 0.25, rank, along_tokens)
                expected = torch.tensor(coded + double(given[b, h, 24:]), dtype=torch.float64)
                assert torch.allclose(found[b, h].double(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_those_of_the_layout(dtype: torch.dtype) -> None:
    tokens, group, residual, bits = 43, 4, 8, 2
    storage = QuantizedStore(bits=bits, group=group, residual=residual).open()
    storage.replace(*slots(tokens, dtype))
    size, coded = dtype.itemsize, tokens - tokens % residual
    keys = (
        coded * math.ceil(KEY_DIM * bits / 8)
        + 2 * (coded // group) * KEY_DIM * size
        + (tokens - coded) * KEY_DIM * size
    )
    old = tokens - residual
    values = old * math.ceil(VALUE_DIM * bits / 8) + 2 * old * math.ceil(VALUE_DIM / group) * size
    values += residual * VALUE_DIM * size
    assert storage.nbytes() == storage.filled_nbytes(0, 0) == BATCH * HEADS * (keys + values)


def test_bytes_count_corrections_and_outliers() -> None:
    tokens, bits, rank = 24, 2, 3
    storage = QuantizedStore(bits=bits, group=8, residual=8, window="block", rank=rank, outliers=0.25).open()
    storage.replace(*slots(tokens))
    keys = tokens * 2 + 2 * 3 * KEY_DIM * 4 + rank * (tokens + KEY_DIM) * 4 + 2 * 3 * KEY_DIM * (4 + 4)
    values = tokens * 3 + 2 * tokens * 2 * 4 + rank * (tokens + VALUE_DIM) * 4 + 2 * 1 * tokens * (4 + 1)
    assert storage.nbytes() == BATCH * HEADS * (keys + values)


@pytest.mark.parametrize(
    "settings", [{}, {"window": "block", "rank": 2, "outliers": 0.1}, {"group": 5, "residual": 10}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16, 33, 64, 100])
def test_what_fits_is_within_the_bytes_and_uses_them(tokens: int, dtype: torch.dtype, settings: dict) -> None:
    store = QuantizedStore(**({"group": 8, "residual": 16} | settings))
    keys, values = slots(tokens, dtype)
    full, least = tokens * form(dtype).slot_bytes, int(store.smallest(torch.tensor(tokens), form(dtype))) // HEADS
    for limit in {least, (least + full) // 2, full - 1}:
        if least <= limit < full:
            storage = store.open()
            storage.replace(keys, values, None, guide(limit, tokens))
            taken = storage.nbytes() // (BATCH * HEADS)
            assert taken <= limit
            extremes = limit in (least, full - 1)
            assert extremes or tokens < 33 or taken >= limit - 3 * form(dtype).slot_bytes
    storage = store.open()
    storage.replace(keys, values, None, guide(full, tokens))
    assert torch.equal(storage.read()[0], keys)
    assert torch.equal(storage.read()[1], values)


def test_more_bytes_never_give_fewer_bits() -> None:
    store = QuantizedStore(group=8, residual=8)
    settings = [store.setting(64, limit, form()) for limit in range(1100, 64 * 64, 50)]
    bits = [32 if setting is None else setting.bits for setting in settings]
    assert bits == sorted(bits)
    assert set(bits) == {2, 4, 8}


def test_one_head_in_a_ragged_batch_is_what_it_is_alone() -> None:
    keys, values = slots(50)
    lengths = torch.tensor([[50, 7], [20, 20]])
    mask = torch.arange(50) < lengths[..., None]
    storage = QuantizedStore(bits=2, group=4, residual=8).open()
    storage.replace(keys, values, mask)
    key, value = slots(1, seed=9)
    for _ in range(9):
        storage.append(key, value)
    read = storage.read()
    for b in range(BATCH):
        for h in range(HEADS):
            alone = QuantizedStore(bits=2, group=4, residual=8).open()
            count = int(lengths[b, h])
            alone.replace(keys[b : b + 1, h : h + 1, :count], values[b : b + 1, h : h + 1, :count])
            for _ in range(9):
                alone.append(key[b : b + 1, h : h + 1], value[b : b + 1, h : h + 1])
            for whole, lone in zip(read, alone.read(), strict=True):
                assert torch.equal(whole[b, h, :count], lone[0, 0, :count])
                assert torch.equal(whole[b, h, 50:], lone[0, 0, count:])
                assert (whole[b, h, count:50] == 0).all()


def test_rows_are_taken_as_codes() -> None:
    storage = QuantizedStore(bits=2, group=4, residual=8).open()
    keys, values = slots(30)
    storage.replace(keys, values, torch.arange(30) < torch.tensor([[30, 30], [11, 30]])[..., None])
    before, size = [tensor.clone() for tensor in storage.read()], storage.nbytes()
    order = torch.tensor([1, 0, 1, 1])
    storage.select(order)
    for was, now in zip(before, storage.read(), strict=True):
        assert torch.equal(now, was[order])
    assert size < storage.nbytes() < 2 * size
    storage.append(*(tensor[order] for tensor in slots(1, seed=3)))
    assert storage.read()[0].shape == (4, HEADS, 31, KEY_DIM)


def test_a_snapshot_shares_memory_and_stays_what_it_was() -> None:
    storage = QuantizedStore(bits=2, group=4, residual=8).open()
    storage.replace(*slots(30))
    snapshot = storage.snapshot()
    before = [tensor.clone() for tensor in storage.read()]
    size = storage.nbytes()
    for step in range(20):
        storage.append(*slots(1, seed=step))
    other = QuantizedStore(bits=2, group=4, residual=8).open()
    for restored in (storage, other, storage):
        restored.restore(snapshot)
        assert all(map(torch.equal, restored.read(), before))
        assert restored.nbytes() == size
        restored.append(*slots(1, seed=7))
    assert other.snapshot()[0].runs[0].keys[0] is storage.snapshot()[0].runs[0].keys[0]


def test_slots_that_come_back_from_a_file_are_the_codes() -> None:
    storage, again = (
        QuantizedStore(bits=2, group=4, residual=8, window="block", rank=1, outliers=0.2).open() for _ in "ab"
    )
    storage.replace(*slots(30), torch.arange(30) < torch.tensor([[30, 12], [30, 30]])[..., None])
    for step in range(12):
        storage.append(*slots(1, seed=step))
    tensors, data = storage.dump()
    again.load({name: tensor.clone() for name, tensor in tensors.items()}, data)
    assert again.nbytes() == storage.nbytes()
    for number in range(10):
        assert all(map(torch.equal, again.read(), storage.read()))
        for one in (storage, again):
            one.append(*slots(1, seed=number))


def test_nothing_is_coded_before_it_is_compressed() -> None:
    storage = QuantizedStore(bits=2, group=4, residual=8).open()
    pieces = [slots(9, seed=seed) for seed in range(4)]
    for keys, values in pieces:
        storage.append(keys, values)
    assert torch.equal(storage.read()[0], torch.cat([keys for keys, _ in pieces], dim=2))


def test_without_a_guide_slots_are_held_as_before() -> None:
    storage = QuantizedStore(group=4, residual=8).open()
    keys, values = slots(64)
    storage.replace(keys, values, None, guide(1400, 64))
    bits = storage.snapshot()[0].runs[0].setting.bits
    storage.replace(keys[:, :, :40], values[:, :, :40])
    piece = storage.snapshot()[0].runs[0].keys[0]
    assert isinstance(piece, Coded)
    assert piece.quantized.bits == bits


def test_blocks_of_decoded_keys_join_the_prompt() -> None:
    storage = QuantizedStore(bits=2, group=4, residual=8).open()
    storage.replace(*slots(32))
    for step in range(40):
        storage.append(*slots(1, seed=step))
    assert [type(piece).__name__ for piece in storage.snapshot()[0].runs[0].keys] == ["Coded", "Plain"]


@pytest.mark.parametrize(
    "settings", [{"bits": 3}, {"group": 0}, {"group": 8, "residual": 12}, {"outliers": 1.0}], ids=str
)
def test_settings_that_make_no_sense_are_refused(settings: dict) -> None:
    with pytest.raises(ValidationError):
        QuantizedStore(**settings)
