"""The layer-paired store against MiniCache number by number, and the two storages of a pair."""

from __future__ import annotations

import math

import oracles_quant as oracles
import pytest
import torch
from kvcomp_strategies.pairing import shared_direction
from kvcomp_strategies.stores.layer_paired import LayerPairedStore

from kvcomp import Guide, SlotForm
from kvcomp.core.storage import SlotStorage

DIM, LAYERS = 8, 4
FORM = SlotForm(LAYERS, 2, DIM, DIM, 4)


def slots(tokens: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of every layer, those of neighbours alike."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(2, 2, 2, tokens, DIM, generator=generator)
    noise = torch.randn(LAYERS, 2, 2, 2, tokens, DIM, generator=generator)
    return [tuple(base + 0.5 * own) for own in noise]  # type: ignore[misc]


def filled(store: LayerPairedStore, tokens: int, limit: int) -> tuple[list[SlotStorage], list]:
    """Storages of all layers, after each was compressed in turn."""
    storages, layers = list(store.open_all(LAYERS)), slots(tokens)
    guide = Guide(torch.full((2, 2), limit), torch.zeros(2, 2, tokens))
    for storage, (keys, values) in zip(storages, layers, strict=True):
        storage.append(keys, values)
        storage.replace(keys, values, None, guide)
    return storages, layers


@pytest.mark.parametrize(
    ("layers", "uppers"), [(1, []), (2, []), (3, [2]), (4, [3]), (8, [5, 7]), (32, list(range(17, 32, 2)))]
)
def test_the_upper_half_is_paired(layers: int, uppers: list[int]) -> None:
    assert list(LayerPairedStore().uppers(layers)) == uppers


@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_merged_layers_are_those_of_minicache(tokens: int) -> None:
    storages, layers = filled(LayerPairedStore(retain=0.05, toward=0.6), tokens, 0)
    kept = math.ceil(0.05 * tokens)
    for kind in range(2):
        for b in range(2):
            for h in range(2):
                pair = [layers[number][kind][b, h].double().tolist() for number in (2, 3)]
                expected = oracles.minicache(*pair, kept, 0.6)
                for number, wanted in zip((2, 3), expected, strict=True):
                    found = storages[number].read()[kind][b, h].double()
                    assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-5)
    for number in (0, 1):
        assert torch.equal(storages[number].read()[0], layers[number][0])


def test_bytes_are_those_of_the_layout() -> None:
    tokens, kept = 33, 2
    storages, _ = filled(LayerPairedStore(), tokens, 0)
    full = tokens * FORM.slot_bytes
    merged = 2 * ((tokens - kept) * (DIM + 2) + 2 * kept * DIM) * 4 + 2 * math.ceil(tokens / 8)
    assert sum(storage.nbytes() for storage in storages) == 2 * 2 * (2 * full + merged)
    assert 2 * int(LayerPairedStore().smallest(torch.tensor(tokens), FORM)) == 2 * 2 * (2 * full + merged)


@pytest.mark.parametrize("share", [0.85, 0.9, 0.95, 0.99])
def test_as_much_is_held_exactly_as_there_is_room_for(share: float) -> None:
    limit = int(share * 100 * FORM.slot_bytes)
    storages, _ = filled(LayerPairedStore(), 100, limit)
    taken = sum(storage.nbytes() for storage in storages)
    assert 0.99 * 4 * LAYERS * limit <= taken <= 4 * LAYERS * limit


def test_where_everything_fits_nothing_is_merged() -> None:
    storages, layers = filled(LayerPairedStore(), 30, 30 * FORM.slot_bytes)
    for storage, (keys, values) in zip(storages, layers, strict=True):
        assert torch.equal(storage.read()[0], keys)
        assert torch.equal(storage.read()[1], values)


def test_decoded_blocks_are_merged_and_rows_snapshots_and_files_hold_pairs_together() -> None:
    store = LayerPairedStore(recent=4)
    storages, _ = filled(store, 20, 0)
    for step in range(30):
        for storage, (keys, values) in zip(storages, slots(1, seed=step), strict=True):
            storage.append(keys, values)
    assert [piece.tokens for piece in storages[3].snapshot()[0][0].runs[0].keys] == [20, 4, 4, 4, 4, 4, 4, 6]
    before = [storage.read() for storage in storages]
    snapshots = [storage.snapshot() for storage in storages]
    dumped = [storage.dump() for storage in storages]
    order = torch.tensor([1, 1, 0])
    for storage in storages:
        storage.select(order)
    for storage, (keys, values) in zip(storages, before, strict=True):
        assert torch.equal(storage.read()[0], keys[order])
        assert torch.equal(storage.read()[1], values[order])
    loaded = list(store.open_all(LAYERS))
    for fresh, (tensors, data) in zip(loaded, dumped, strict=True):
        fresh.load(tensors, data)
    for storage, snapshot in zip(storages, snapshots, strict=True):
        storage.restore(snapshot)
    for storage, fresh, pair in zip(storages, loaded, before, strict=True):
        assert all(map(torch.equal, storage.read(), pair))
        assert all(map(torch.equal, fresh.read(), pair))


def test_the_upper_layer_is_read_while_the_lower_is_already_new() -> None:
    storages, _ = filled(LayerPairedStore(), 20, 0)
    before = storages[3].read()
    storages[2].replace(*slots(5)[2])
    assert all(map(torch.equal, storages[3].read(), before))


@pytest.mark.parametrize("fill", ["zero", "parallel", "opposite", "extreme"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_any_vectors_give_finite_slots(dtype: torch.dtype, fill: str) -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(2, 3, 12, DIM, generator=generator)
    if fill == "zero":
        one[:, :, ::2] = 0
    if fill == "extreme":
        one = one.sign() * (torch.finfo(dtype).max if dtype == torch.float16 else 1e15)
    other = {"parallel": 2 * one, "opposite": -one}.get(fill, one.flip(2))
    storages = LayerPairedStore(start=0.0, retain=0.0).open_all(2)
    guide = Guide(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, 12))
    for storage, vectors in zip(storages, (one.to(dtype), other.to(dtype)), strict=True):
        storage.replace(vectors, vectors, None, guide)
    for storage, vectors in zip(storages, (one.to(dtype), other.to(dtype)), strict=True):
        assert storage.read()[0].isfinite().all()
        if fill == "parallel":
            assert torch.allclose(storage.read()[0], vectors, rtol=4 * torch.finfo(dtype).eps)


def test_distances_go_from_parallel_to_opposite() -> None:
    one = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    other = torch.tensor([[3.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])
    direction, apart = shared_direction(one, other, toward=0.6)
    assert apart.tolist() == pytest.approx([0.0, 0.5, 1.0])
    assert direction[:2].norm(dim=-1).tolist() == pytest.approx([1.0, 1.0])
