"""Parts that apply another part of their kind."""

from __future__ import annotations

from typing import TypeVar

from kvcomp.core.interfaces import Part

Inner = TypeVar("Inner", bound=Part)


def another(inner: Inner, outer: type[Part]) -> Inner:
    """Return the part that another one applies.

    Raises:
        ValueError: it is that part again, which gains nothing.
    """
    if isinstance(inner, outer):
        raise ValueError(f"must be a {inner.kind} other than {outer.use!r}, which gains nothing inside itself")
    return inner
