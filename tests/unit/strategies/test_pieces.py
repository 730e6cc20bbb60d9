"""Pieces: how they are cut, joined, changed together, and written down."""

from __future__ import annotations

import json

import pytest
import torch
from kvcomp_strategies.cutting import Cut, cut_all, extended, shortened
from kvcomp_strategies.pieces import Code, Coded, Piece, Plain, Tiered, flat, grown, mapped, packed_tier, read_all
from kvcomp_strategies.pieces import tensors as tensors_of
from kvcomp_strategies.quantization import CHANNELS, TOKENS

NUMBERS = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))


def coded(numbers: torch.Tensor, axis: int = TOKENS) -> Coded:
    return Coded.of(numbers, Code(bits=4, group=4, axis=axis))


@pytest.mark.parametrize("axis", [TOKENS, CHANNELS])
@pytest.mark.parametrize("extras", [{}, {"rank": 2}, {"outliers": 0.5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_counted_as_they_are_held(dtype: torch.dtype, extras: dict, axis: int) -> None:
    for tokens in (1, 4, 5, 12):
        code = Code(2, 4, axis, **extras)
        piece = Coded.of(NUMBERS[:, :tokens].to(dtype), code)
        held = sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(piece))
        assert held == 2 * int(code.nbytes(torch.tensor(tokens), 5, dtype.itemsize))
        assert piece.read().dtype == dtype


def test_whole_groups_join_and_read_as_one() -> None:
    joined = coded(NUMBERS[:, :8]).joined(coded(NUMBERS[:, 8:]))
    assert joined is not None
    assert torch.equal(joined.read(), coded(NUMBERS).read())


@pytest.mark.parametrize(
    "other",
    [
        Plain(NUMBERS[:, 8:]),
        Coded.of(NUMBERS[:, 8:], Code(2, 4, TOKENS)),
        Coded.of(NUMBERS[:, 8:], Code(4, 4, TOKENS, rank=1)),
        Coded.of(NUMBERS[:, 8:], Code(4, 4, TOKENS), balance=torch.ones(2, 1, 5)),
    ],
    ids=["plain", "other bits", "corrected", "balanced"],
)
def test_what_is_coded_otherwise_stays_apart(other: Plain | Coded) -> None:
    assert coded(NUMBERS[:, :8]).joined(other) is None


def test_a_short_group_of_keys_stays_apart_and_values_always_join() -> None:
    assert coded(NUMBERS[:, :7]).joined(coded(NUMBERS[:, 7:])) is None
    joined = coded(NUMBERS[:, :7], CHANNELS).joined(coded(NUMBERS[:, 7:], CHANNELS))
    assert joined is not None
    assert torch.equal(joined.read(), coded(NUMBERS, CHANNELS).read())


def pieces_with_plain(numbers: torch.Tensor, code: Code, coded: int) -> tuple[Piece, ...]:
    return (Coded.of(numbers[:, :coded], code), Plain(numbers[:, coded:].clone()))


def shapes(pieces: tuple[Piece, ...]) -> list[tuple[str, int]]:
    return [(type(piece).__name__, piece.tokens) for piece in pieces]


def test_the_front_of_what_is_plain_is_cut_off_and_coded() -> None:
    code = Code(4, 4, TOKENS)
    pieces = cut_all([Cut(pieces_with_plain(NUMBERS, code, 4), 4, code)])[0]
    assert shapes(pieces) == [("Coded", 8), ("Plain", 4)]
    assert torch.equal(read_all(pieces)[:, 8:], NUMBERS[:, 8:])
    assert torch.equal(read_all(pieces)[:, :8], coded(NUMBERS[:, :8]).read())


@pytest.mark.parametrize("axis", [TOKENS, CHANNELS])
@pytest.mark.parametrize("extras", [{}, {"rank": 1}, {"outliers": 0.5}])
def test_heads_that_are_coded_together_get_what_each_gets_alone(axis: int, extras: dict) -> None:
    code = Code(4, 4, axis, **extras)
    cuts = [Cut(pieces_with_plain(NUMBERS[head : head + 1, : 10 + head], code, 4), 4, code) for head in range(2)]
    for one, together in zip(cuts, cut_all(cuts), strict=True):
        alone = cut_all([one])[0]
        assert all(map(torch.equal, tensors_of(together), tensors_of(alone)))
        storages = [tensor.untyped_storage() for tensor in tensors_of(together[:-1])]
        assert [storage.nbytes() for storage in storages] == [
            tensor.numel() * tensor.itemsize for tensor in tensors_of(together[:-1])
        ]


def test_what_is_coded_ahead_is_read_as_it_was_until_its_turn_comes() -> None:
    code = Code(4, 4, CHANNELS)
    pieces = pieces_with_plain(NUMBERS, code, 2)
    calls = 0
    for shown in range(3, 13):
        before = pieces[0]
        pieces = cut_all([Cut(pieces, 1, code)])[0]
        assert shapes(pieces) == [("Coded", shown), ("Plain", 12 - shown)]
        assert torch.equal(read_all(pieces)[:, :shown], coded(NUMBERS[:, :shown], CHANNELS).read())
        assert torch.equal(read_all(pieces)[:, shown:], NUMBERS[:, shown:])
        calls += before.quantized.codes is not pieces[0].quantized.codes  # type: ignore[attr-defined]
    assert calls == 1


def test_what_was_coded_ahead_is_forgotten_with_the_tokens_that_go() -> None:
    code = Code(4, 4, CHANNELS)
    pieces = cut_all([Cut(pieces_with_plain(NUMBERS, code, 2), 1, code)])[0]
    pieces = extended(shortened(pieces, 7), NUMBERS[:, :4])
    for _ in range(6):
        pieces = cut_all([Cut(pieces, 1, code)])[0]
    expected = torch.cat([NUMBERS[:, :5], NUMBERS[:, :4]], dim=1)
    assert torch.equal(read_all(pieces), coded(expected, CHANNELS).read())


def test_tiers_are_read_in_the_order_of_the_tokens() -> None:
    tier = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 1]], dtype=torch.bool)
    numbers = NUMBERS[:, :6]
    high, low = (torch.stack([numbers[head][mask[head]] for head in range(2)]) for mask in (tier, ~tier))
    assert torch.equal(Tiered(Plain(high), Plain(low), packed_tier(tier)).read(), numbers)


def test_a_tensor_in_two_places_is_changed_and_written_once() -> None:
    tier = packed_tier(torch.ones(2, 3, dtype=torch.bool))
    pair = tuple(Tiered(Plain(NUMBERS[:, :3]), Plain(NUMBERS[:, :0]), tier) for _ in range(2))
    changed = mapped(pair, torch.clone)
    assert changed[0].tier is changed[1].tier
    assert changed[0].tier is not tier
    found: dict[str, torch.Tensor] = {}
    again = grown(json.loads(json.dumps(flat(pair, found))), found)
    assert len(found) == 5  # two pairs of numbers, one tier
    assert again[0].tier is again[1].tier
    assert torch.equal(read_all(again), read_all(pair))
