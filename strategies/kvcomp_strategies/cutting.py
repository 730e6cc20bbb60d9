"""How a run goes on: what is new joins its plain piece, and what is no longer recent is cut off that and coded."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp_strategies.pieces import Code, Coded, Piece, Plain, mapped, owned

AHEAD = 16  # tokens that are coded in one call where one after the other is due


@dataclass(frozen=True, eq=False)
class Cut:
    """How many tokens of the plain piece at the end of some pieces are to be read as codes from now on.

    Attributes:
        pieces: the last one of them plain.
        count: tokens of it, the first ones; 0 for none.
        code: how they are coded.
        balance: `(heads, 1, dim)` float32, or None.
    """

    pieces: tuple[Piece, ...]
    count: int
    code: Code
    balance: Tensor | None = None

    @property
    def plain(self) -> Tensor:
        """Return what is plain, `(heads, tokens, dim)`."""
        last = self.pieces[-1]
        assert isinstance(last, Plain)
        return last.numbers

    @property
    def coded(self) -> int:
        """Return how many tokens are coded in one call: some ahead of time, where that gives the same codes."""
        return max(self.count, min(AHEAD, self.plain.shape[1])) if self.code.by_token else self.count

    def known(self) -> tuple[Piece, ...] | None:
        """Return the pieces after the cut where the tokens were coded ahead of time, else None."""
        before = self.pieces[-2] if len(self.pieces) > 1 else None
        if not isinstance(before, Coded) or before.ahead < self.count:
            return None
        return (*self.pieces[:-2], dataclasses.replace(before, ahead=before.ahead - self.count), self._rest())

    def done(self, piece: Coded) -> tuple[Piece, ...]:
        """Return the pieces after the cut, given the code of `coded` tokens; joined where possible."""
        piece = dataclasses.replace(piece, ahead=self.coded - self.count)
        before = without_ahead(self.pieces[:-1])
        joined = before[-1].joined(piece) if before and isinstance(before[-1], Coded) else None
        if joined is None:
            return (*before, mapped(piece, owned), self._rest())
        return (*before[:-1], joined, self._rest())

    def _rest(self) -> Plain:
        """Return what stays plain: a view of what it was, which `extended` copies."""
        return Plain(self.plain[:, self.count :])


def cut_all(cuts: Sequence[Cut]) -> list[tuple[Piece, ...]]:
    """Return the pieces of each cut after it. Heads that are coded alike are coded in one call."""
    after = [one.pieces for one in cuts]
    alike: dict[object, list[int]] = defaultdict(list)
    for place, one in enumerate(cuts):
        if one.count <= 0:
            continue
        if (known := one.known()) is not None:
            after[place] = known
        else:  # sums over the tokens of a head depend on how many heads there are
            alone = one.code.rank or one.code.outliers
            alike[place if alone else (one.coded, one.code, one.balance is None)].append(place)
    for places in alike.values():
        for place, piece in zip(places, _coded([cuts[place] for place in places]), strict=True):
            after[place] = cuts[place].done(piece)
    return after


def _coded(cuts: Sequence[Cut]) -> list[Coded]:
    """Return the code of each cut; of several, views of one."""
    old = [one.plain[:, : one.coded] for one in cuts]
    if len(cuts) == 1:
        return [Coded.of(old[0], cuts[0].code, cuts[0].balance)]
    balances = [one.balance for one in cuts if one.balance is not None]
    whole = Coded.of(torch.cat(old), cuts[0].code, torch.cat(balances) if balances else None)
    return whole.split([len(numbers) for numbers in old], [one.balance for one in cuts])


def without_ahead(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """Return the pieces without what the last of them holds ahead of time."""
    if not pieces or not isinstance(last := pieces[-1], Coded) or not last.ahead:
        return pieces
    return (*pieces[:-1], dataclasses.replace(last, quantized=mapped(last.shown, owned), ahead=0))


def plain_tokens(pieces: tuple[Piece, ...]) -> int:
    """Return how many tokens at the end are held as they are."""
    last = pieces[-1]
    return last.tokens if isinstance(last, Plain) else 0


def extended(pieces: tuple[Piece, ...], numbers: Tensor) -> tuple[Piece, ...]:
    """Return the pieces with more tokens, `(heads, tokens, dim)`, as they are, in memory of their own."""
    if pieces and isinstance(last := pieces[-1], Plain):
        return (*pieces[:-1], Plain(torch.cat([last.numbers, numbers], dim=1)))
    return (*pieces, Plain(owned(numbers)))


def shortened(pieces: tuple[Piece, ...], count: int) -> tuple[Piece, ...]:
    """Return the pieces without the last `count` tokens, all of the plain one at their end, which may be left empty."""
    last = pieces[-1]
    assert isinstance(last, Plain)
    assert last.tokens >= count
    return (*without_ahead(pieces[:-1]), Plain(owned(last.numbers[:, : last.tokens - count])))
