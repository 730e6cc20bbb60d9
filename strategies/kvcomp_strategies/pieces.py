"""Runs of tokens held in few bytes. A piece is never changed: what changes is which pieces a storage holds."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvcomp_strategies.quantization import (
    CHANNELS,
    TOKENS,
    Outliers,
    Quantized,
    dequantize,
    finite,
    in_one,
    limited_,
    low_rank,
    outlier_pairs,
    pack,
    place_dtype,
    quantize,
    row_bytes,
    split_outliers,
    unpack,
)

Tree = TypeVar("Tree")


HELD: dict[str, type] = {}  # what a file may hold, by name


def held(kind: type[Tree]) -> type[Tree]:
    """Let `flat` and `grown` write and read a dataclass."""
    HELD[kind.__name__] = kind
    return kind


class Piece(ABC):
    """Consecutive tokens of some heads; every tensor of it has the heads as its first axis."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Return the number of tokens."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """Return the number of heads."""

    @abstractmethod
    def room(self, tokens: int) -> Tensor:
        """Return memory for tokens of these heads as they came, `(heads, tokens, dim)`, whatever it holds."""

    @abstractmethod
    def read(self) -> Tensor:
        """Return `(heads, tokens, dim)` in the dtype that came in."""

    def read_into(self, out: Tensor) -> None:
        """Put what `read` returns into a part of larger memory."""
        out.copy_(self.read())


@held
@dataclass(frozen=True, eq=False)
class Plain(Piece):
    """Tokens as they came, `(heads, tokens, dim)`."""

    numbers: Tensor

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return self.numbers.shape[1]

    @property
    def heads(self) -> int:
        """Return the number of heads."""
        return self.numbers.shape[0]

    def room(self, tokens: int) -> Tensor:
        """Return memory for tokens of these heads."""
        return self.numbers.new_empty(self.numbers.shape[0], tokens, self.numbers.shape[2])

    def read(self) -> Tensor:
        """Return the tokens themselves."""
        return self.numbers


@dataclass(frozen=True)
class Code:
    """How numbers are coded.

    Attributes:
        bits: of one code.
        group: numbers that share a scale.
        axis: along which they do, `TOKENS` or `CHANNELS`.
        rank: of the correction of the error, 0 for none.
        outliers: share of each vector that is kept as it is.
    """

    bits: int
    group: int
    axis: int
    rank: int = 0
    outliers: float = 0.0

    @property
    def by_token(self) -> bool:
        """Return whether the code of a token is the same whatever is coded with it."""
        return self.axis == CHANNELS and not self.rank and not self.outliers

    def nbytes(self, tokens: Tensor, dim: int, itemsize: int) -> Tensor:
        """Return the bytes of one head's tokens, of the shape of `tokens` (int64)."""
        groups = -(-tokens // self.group) * dim if self.axis == TOKENS else tokens * -(-dim // self.group)
        rank = tokens.clamp(max=min(self.rank, dim))
        total = tokens * row_bytes(dim, self.bits) + groups * 2 * itemsize + rank * (tokens + dim) * itemsize
        if self.axis == TOKENS:
            kept = (tokens.double() * self.outliers / 2).long() * 2 * dim  # as `outlier_pairs` counts
            return total + kept * (itemsize + place_dtype(1, TOKENS).itemsize)
        return total + tokens * outlier_pairs(dim, self.outliers) * 2 * (itemsize + place_dtype(dim, CHANNELS).itemsize)


@held
@dataclass(frozen=True, eq=False)
class Coded(Piece):
    """Quantized tokens, with the outliers and the low-rank correction of GEAR where there are any.

    `left` `(heads, tokens, rank)` and `right` `(heads, rank, dim)` multiply to the correction; `balance`
    `(heads, 1, dim)` float32 divides what was read. The last `ahead` tokens were coded ahead of time and are not there
    yet: they are still held as they are, by the plain piece that follows.
    """

    quantized: Quantized
    outliers: Outliers | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    balance: Tensor | None = None
    ahead: int = 0

    @classmethod
    def of(cls, numbers: Tensor, code: Code, balance: Tensor | None = None) -> Coded:
        """Return the code of `(heads, tokens, dim)`, multiplied by the balance before it is quantized."""
        dtype = numbers.dtype
        numbers = numbers if balance is None else finite(numbers.float() * balance, dtype)
        inner, outliers = split_outliers(numbers, code.outliers, code.axis)
        piece = cls(quantize(inner, code.bits, code.group, code.axis), outliers)
        if code.rank:
            left, right = low_rank(numbers.float() - piece.approximation(), code.rank)
            piece = dataclasses.replace(piece, left=finite(left, dtype), right=finite(right, dtype))
        return piece if balance is None else dataclasses.replace(piece, balance=owned(balance))

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return self.quantized.codes.shape[1] - self.ahead

    @property
    def shown(self) -> Quantized:
        """Return the codes of the tokens."""
        return self.quantized.first(self.tokens) if self.ahead else self.quantized

    @property
    def heads(self) -> int:
        """Return the number of heads."""
        return self.quantized.codes.shape[0]

    def room(self, tokens: int) -> Tensor:
        """Return memory for tokens of these heads."""
        return self.quantized.scale.new_empty(self.quantized.codes.shape[0], tokens, self.quantized.dim)

    @property
    def plain(self) -> bool:
        """Return whether codes are all there is, but for a balance."""
        return self.outliers is None and self.left is None

    def approximation(self, out: Tensor | None = None) -> Tensor:
        """Return the balanced numbers in float32, in `out` where it is given; outliers are exact."""
        return self.corrected_(dequantize(self.shown, out))

    def corrected_(self, numbers: Tensor) -> Tensor:
        """Return `(heads, tokens, dim)`, what the codes stand for, corrected and with outliers put back, in place."""
        if self.left is not None and self.right is not None:
            numbers += self.left.float() @ self.right.float()
        return numbers if self.outliers is None else self.outliers.put_back_(numbers)

    def read(self) -> Tensor:
        """Return the numbers that the codes stand for."""
        return self._numbers().to(self.quantized.scale.dtype)

    def read_into(self, out: Tensor) -> None:
        """Put the numbers there, without a copy of them on the way where they are float32."""
        if out.dtype == torch.float32:
            self._numbers(out)
        else:
            out.copy_(self._numbers())

    def _numbers(self, out: Tensor | None = None) -> Tensor:
        numbers = self.approximation(out)
        if self.balance is not None:
            numbers /= self.balance
        return limited_(numbers, self.quantized.scale.dtype)

    def split(self, heads: Sequence[int], balances: Sequence[Tensor | None]) -> list[Coded]:
        """Return views of so many heads each, with balances that stand for their part of this one's."""
        assert self.plain
        whole = self.quantized
        parts = [torch.split_with_sizes(tensor, list(heads)) for tensor in (whole.codes, whole.scale, whole.zero)]
        return [
            Coded(dataclasses.replace(whole, codes=codes, scale=scale, zero=zero), balance=balance)
            for codes, scale, zero, balance in zip(*parts, balances, strict=True)
        ]

    def joined(self, other: Piece) -> Coded | None:
        """Return both as one piece, None where that would change the groups or what the pieces share."""
        if not isinstance(other, Coded) or other.balance is not self.balance or self.ahead:
            return None
        one, two = self.quantized, other.quantized
        extras = (self.outliers, self.left, other.outliers, other.left)
        if any(extra is not None for extra in extras) or one.bits != two.bits:
            return None
        if one.axis == TOKENS and self.tokens % one.group:
            return None
        pairs = ((one.codes, two.codes), (one.scale, two.scale), (one.zero, two.zero))
        codes, scale, zero = (torch.cat(pair, dim=1) for pair in pairs)
        joined = Quantized(codes, scale, zero, one.bits, one.group, one.axis, one.dim)
        return Coded(joined, balance=self.balance, ahead=other.ahead)


@held
@dataclass(frozen=True, eq=False)
class Tiered(Piece):
    """Tokens of which some are held precisely and the others are not.

    Attributes:
        high, low: the two kinds, each in the order of the tokens.
        tier: `(heads, ceil(tokens / 8))` uint8, a packed bit per token, 1 where it is high.
    """

    high: Piece
    low: Piece
    tier: Tensor

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return self.high.tokens + self.low.tokens

    @property
    def heads(self) -> int:
        """Return the number of heads."""
        return self.tier.shape[0]

    def room(self, tokens: int) -> Tensor:
        """Return memory for tokens of these heads."""
        return self.high.room(tokens)

    def read(self) -> Tensor:
        """Return the tokens of both kinds in their order."""
        numbers = torch.cat([self.high.read(), self.low.read()], dim=1)
        places = once_high_first(unpack(self.tier, 1, self.tokens))
        places += torch.arange(0, places.numel(), self.tokens, device=places.device)[:, None]
        return numbers.flatten(0, 1).index_select(0, places.flatten()).view(numbers.shape)


def high_first(tier: Tensor) -> Tensor:
    """Return `(heads, tokens)` int64: the places of the high tokens, then those of the low ones, each ascending."""
    return (1 - tier).argsort(dim=-1, stable=True)


def once_high_first(tier: Tensor) -> Tensor:
    """Return `(heads, tokens)` int64: where each token stands in `high_first`, whose inverse this is."""
    high = tier.long().cumsum(dim=-1)
    low = high[:, -1:] + torch.arange(tier.shape[1], device=tier.device) - high
    return torch.where(tier.bool(), high - 1, low)


def packed_tier(tier: Tensor) -> Tensor:
    """Return `(heads, tokens)` bool as packed bits."""
    return pack(tier.to(torch.uint8), 1)


def read_all(pieces: tuple[Piece, ...]) -> Tensor:
    """Return all tokens, `(heads, tokens, dim)`."""
    if len(pieces) == 1:
        return pieces[0].read()
    lengths = [piece.tokens for piece in pieces]
    numbers = pieces[0].room(sum(lengths))
    for piece, part in zip(pieces, torch.split_with_sizes(numbers, lengths, dim=1), strict=True):
        piece.read_into(part)
    return numbers


def read_together(pieces: Sequence[Coded]) -> tuple[Tensor, list[int]]:
    """Return the tokens of several codes of one kind, one head after the other, `(rows, dim)`, and how far apart the
    heads of each are: further than it has tokens where its last group is not full.
    """
    joined, strides = in_one([piece.shown for piece in pieces])
    numbers = dequantize(joined)
    if any(piece.balance is not None or not piece.plain for piece in pieces):
        rows = torch.split_with_sizes(
            numbers, [stride * one.heads for stride, one in zip(strides, pieces, strict=True)]
        )
        for piece, part in zip(pieces, rows, strict=True):
            own = piece.corrected_(part.view(piece.heads, -1, joined.dim)[:, : piece.tokens])
            if piece.balance is not None:
                own.div_(piece.balance)
    return limited_(numbers, joined.scale.dtype).to(joined.scale.dtype), strides


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yield every tensor in dataclasses and tuples, at any depth."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for item in tree:
            yield from tensors(item)
    elif dataclasses.is_dataclass(tree):
        for field in dataclasses.fields(tree):
            yield from tensors(getattr(tree, field.name))


def mapped(tree: Tree, change: Callable[[Tensor], Tensor], memo: dict[int, Tensor] | None = None) -> Tree:
    """Return dataclasses and tuples with every tensor changed; one that stands in two places is changed once."""
    memo = {} if memo is None else memo
    result: Any = tree
    if isinstance(tree, Tensor):
        if id(tree) not in memo:
            memo[id(tree)] = change(tree)
        result = memo[id(tree)]
    elif isinstance(tree, tuple):
        result = tuple(mapped(item, change, memo) for item in tree)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree)]
        result = dataclasses.replace(tree, **{name: mapped(getattr(tree, name), change, memo) for name in names})
    return result  # type: ignore[no-any-return]


def flat(tree: Any, found: dict[str, Tensor]) -> Any:
    """Return dataclasses and tuples as data that JSON can hold; tensors go to `found` under the names that stand there.

    >>> flat(Plain(torch.zeros(1, 2, 3)), {})
    {'is': 'Plain', 'numbers': {'tensor': 'code.0'}}
    """
    if isinstance(tree, Tensor):
        names = [name for name, tensor in found.items() if tensor is tree] or [f"code.{len(found)}"]
        found[names[0]] = tree
        return {"tensor": names[0]}
    if isinstance(tree, tuple):
        return [flat(item, found) for item in tree]
    if dataclasses.is_dataclass(tree):
        fields = {field.name: flat(getattr(tree, field.name), found) for field in dataclasses.fields(tree)}
        return {"is": type(tree).__name__} | fields
    return tree


def grown(data: Any, found: Mapping[str, Tensor]) -> Any:
    """Return what `flat` was given."""
    if isinstance(data, list):
        return tuple(grown(item, found) for item in data)
    if not isinstance(data, dict):
        return data
    if "tensor" in data:
        return found[data["tensor"]]
    return HELD[data["is"]](**{name: grown(value, found) for name, value in data.items() if name != "is"})


def owned(tensor: Tensor) -> Tensor:
    """Return the tensor itself where its storage holds nothing else, else a contiguous copy."""
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


held(Quantized)
held(Outliers)
