"""When a cache is compressed again while tokens are decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvcomp.core.errors import ConfigError, suggest

SPELLINGS = "prefill-end, over-budget or {every: N}, N a whole number of decoded tokens, at least 1"
NAMES = ("prefill-end", "over-budget")


@dataclass(frozen=True)
class Trigger:
    """When to compress, beside the end of every forward of more than one token, where each method does.

    `Trigger()` is `prefill-end`: what is decoded stays until the next such forward.

    Attributes:
        every: after so many decoded tokens, to the budget of all tokens seen so far.
        over_budget: after every decoded token with which a row holds more than its budget. The budget of a ratio is
            then that of the tokens seen at the end of the last forward of more than one token, so that a generation of
            any length stays within what its prompt was given; one in tokens or bytes is what it is. At a ratio of 1
            everything stays.
    """

    every: int | None = None
    over_budget: bool = False

    def __post_init__(self) -> None:
        if self.every is not None and (type(self.every) is not int or self.every < 1 or self.over_budget):
            raise _fault(self.every)

    @classmethod
    def parse(cls, value: Trigger | str | Mapping[str, Any]) -> Trigger:
        """Return the trigger that a name or a mapping spells.

        Raises:
            ConfigError: it is none of the three spellings.

        >>> Trigger.parse({"every": 64}), Trigger.parse("over-budget")
        (Trigger(every=64, over_budget=False), Trigger(every=None, over_budget=True))
        """
        if isinstance(value, Trigger):
            return value
        if isinstance(value, Mapping) and set(value) == {"every"} and type(value["every"]) is int:
            return cls(every=value["every"])
        if value not in NAMES:
            raise _fault(value)
        return cls(over_budget=value == "over-budget")

    @property
    def decoding(self) -> bool:
        """Return whether anything is compressed while tokens are decoded."""
        return self.over_budget or self.every is not None

    def dump(self) -> str | dict[str, int]:
        """Return the form that a strategy file holds; `parse` reads it back."""
        return {"every": self.every} if self.every is not None else NAMES[self.over_budget]

    def __str__(self) -> str:
        return f"every {self.every} tokens" if self.every is not None else NAMES[self.over_budget]


PREFILL_END = Trigger()


def _fault(value: Any) -> ConfigError:
    hint = f" {suggest(value, NAMES)}" if isinstance(value, str) else ""
    return ConfigError([f"trigger: must be {SPELLINGS}, got {value!r}.{hint}"])
