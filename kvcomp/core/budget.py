"""A budget: what a request may keep. It is resolved to integer slots here and nowhere else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from kvcomp.core.errors import BudgetError

SPELLINGS = "a ratio in (0, 1] such as 0.2, {tokens: 512} (or '512t'), or {bytes: 64MiB} (or '64MiB')"
OR_SMALLEST = " or smallest"
BYTE_UNITS = {"B": 1} | {f"{prefix}iB": 2 ** (10 * power) for power, prefix in enumerate("KMGT", 1)}
BYTE_UNITS |= {f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class Budget:
    """How much of a sequence is kept: exactly one of a ratio, a number of tokens, or a number of bytes.

    All three are per sequence (per row of a batch), so that a row keeps in a batch what it keeps alone. Bytes are
    those of keys and values over all compressed layers.

    Attributes:
        ratio: share of the tokens seen, in (0, 1], the exact fraction of the decimal as written.
        tokens: slots per KV head and layer.
        bytes: bytes of keys and values over all layers.
        or_smallest: a row for which this is too little gets the smallest budget that its method can do with, instead
            of an error; written `0.5 or smallest`.
    """

    ratio: Fraction | None = None
    tokens: int | None = None
    bytes: int | None = None
    or_smallest: bool = False

    def __post_init__(self) -> None:
        if sum(field is not None for field in (self.ratio, self.tokens, self.bytes)) != 1:
            raise BudgetError(f"a budget must be exactly one of: {SPELLINGS}")
        if isinstance(self.ratio, float | int):
            object.__setattr__(self, "ratio", Fraction(str(self.ratio)))
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise BudgetError(
                f"a bare budget is a ratio in (0, 1], got {float(self.ratio):g}; write one of: {SPELLINGS}"
            )
        for unit, value in (("tokens", self.tokens), ("bytes", self.bytes)):
            if value is not None and value < 1:
                raise BudgetError(f"a budget in {unit} must be at least 1, got {value}")

    @classmethod
    def parse(cls, value: Budget | float | str | Mapping[str, Any]) -> Budget:
        """Return the budget that a number, a string or a mapping spells. Units of bytes may be in small letters, and a
        string may end in ` or smallest`.

        Raises:
            BudgetError: the value is none of the three spellings, or out of range.

        >>> Budget.parse(0.2).ratio, Budget.parse("512t").tokens, Budget.parse({"bytes": "1KiB"}).bytes
        (Fraction(1, 5), 512, 1024)
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, Mapping):
            return cls._from_mapping(value)
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise BudgetError(f"a budget must be {SPELLINGS}; got {value!r}")
        if isinstance(value, str) and value.strip().endswith(OR_SMALLEST):
            return replace(cls.parse(value.strip().removesuffix(OR_SMALLEST)), or_smallest=True)
        if isinstance(value, str) and (tokens := re.fullmatch(r"\s*(\d+)\s*t(okens)?\s*", value)):
            return cls(tokens=int(tokens[1]))
        if isinstance(value, str) and value.strip().lower().endswith("b"):
            return cls(bytes=_parse_bytes(value))
        try:
            ratio = Fraction(str(value).strip())
        except (ValueError, ZeroDivisionError):
            raise BudgetError(f"a budget must be {SPELLINGS}; got {value!r}") from None
        return cls(ratio=ratio)

    @classmethod
    def _from_mapping(cls, value: Mapping[str, Any]) -> Budget:
        if set(value) == {"tokens"} and type(value["tokens"]) is int:
            return cls(tokens=value["tokens"])
        if set(value) == {"bytes"} and type(value["bytes"]) in (int, str):
            return cls(bytes=_parse_bytes(value["bytes"]))
        raise BudgetError(f"a budget must be {SPELLINGS}; got {dict(value)!r}")

    def dump(self) -> float | str | dict[str, int]:
        """Return the form that a strategy file holds; `Budget.parse` reads it back."""
        if self.or_smallest:
            own = replace(self, or_smallest=False)
            return f"{own.dump() if self.ratio is not None else own}{OR_SMALLEST}"
        if self.ratio is not None:
            decimal = float(self.ratio)
            return decimal if Fraction(str(decimal)) == self.ratio else str(self.ratio)
        return {"tokens": self.tokens} if self.tokens is not None else {"bytes": self.bytes or 0}

    def __str__(self) -> str:
        if self.or_smallest:
            return f"{replace(self, or_smallest=False)}{OR_SMALLEST}"
        if self.ratio is not None:
            return f"{float(self.ratio):g}"
        return f"{self.tokens}t" if self.tokens is not None else f"{self.bytes}B"

    def slots(self, tokens: Tensor, slot_bytes: int) -> Tensor:
        """Return the slots per KV head and layer that each row may keep: at least 1, at most its tokens.

        Args:
            tokens: valid tokens seen by each row so far, `(batch,)` int64, on the CPU.
            slot_bytes: bytes of one slot summed over the KV heads of all compressed layers.

        Returns:
            `(batch,)` int64 on the CPU: slots decide shapes.

        Raises:
            BudgetError: the bytes do not pay for one slot per KV head and layer.
        """
        if self.ratio is not None:
            slots = tokens * self.ratio.numerator // self.ratio.denominator
        elif self.tokens is not None:
            slots = torch.full_like(tokens, self.tokens)
        else:
            slots = torch.full_like(tokens, self._affordable(slot_bytes, tokens))
        return slots.clamp(min=1).minimum(tokens)

    def nbytes(self, tokens: Tensor, slot_bytes: int) -> Tensor:
        """Return the bytes of keys and values that each row may take over all compressed layers, `(batch,)` int64.

        A ratio is the share of what all tokens would take in full precision, a number of tokens what so many would.
        """
        if self.bytes is not None:
            return torch.full_like(tokens, self.bytes)
        if self.ratio is None:
            return tokens.clamp(max=self.tokens) * slot_bytes
        up, down = self.ratio.as_integer_ratio()
        return torch.tensor([count * slot_bytes * up // down for count in tokens.tolist()])

    def _affordable(self, slot_bytes: int, tokens: Tensor) -> int:
        assert self.bytes is not None
        if self.bytes < slot_bytes and not self.or_smallest:
            raise BudgetError(
                f"a budget of {self.bytes} bytes is below one slot per KV head and layer, which takes {slot_bytes} "
                f"bytes in this model; ask for at least that",
                smallest=math.ceil(10**6 / max(int(tokens.max()), 1)) / 10**6,
            )
        return self.bytes // slot_bytes


def _parse_bytes(value: int | str) -> int:
    if isinstance(value, int):
        return value
    units = {unit.lower(): size for unit, size in BYTE_UNITS.items()}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
    if match is None or (match[2] or "b") not in units:
        raise BudgetError(f"bytes must be a whole number or like '64MiB' ({', '.join(BYTE_UNITS)}); got {value!r}")
    return int(Fraction(match[1]) * units[match[2] or "b"])
