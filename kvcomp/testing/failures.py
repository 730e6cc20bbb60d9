"""What a broken promise looks like."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from kvcomp.core.errors import KVCompError

MOST_SHOWN = 4  # positions of a fault that a message lists


class ConformanceError(KVCompError, AssertionError):
    """A part or recipe that breaks a promise. `promise` names it, `seen` says what was seen instead."""

    def __init__(self, seen: str, promise: str = "", where: str = "") -> None:
        self.seen = seen
        self.promise = promise
        self.where = where
        super().__init__(f"{where} breaks the promise {promise!r}: {seen}" if promise else seen)


def fail(seen: str) -> NoReturn:
    """Raise the error for what was seen."""
    raise ConformanceError(seen)


def require(holds: bool, seen: str) -> None:
    """Raise a `ConformanceError` unless this holds. `python -O` does not remove it."""
    if not holds:
        fail(seen)


def require_all(holds: Tensor, seen: str) -> None:
    """Raise a `ConformanceError` that lists where a bool tensor is false."""
    if not bool(holds.all()):
        places = (~holds).nonzero().tolist()
        more = ", ..." if len(places) > MOST_SHOWN else ""
        fail(f"{seen} (at {', '.join(map(str, places[:MOST_SHOWN]))}{more})")


def require_same(one: Tensor, other: Tensor, seen: str) -> None:
    """Raise a `ConformanceError` unless two tensors have the same type, shape and bits."""
    require(one.dtype == other.dtype, f"{seen}: {one.dtype} became {other.dtype}")
    require(one.shape == other.shape, f"{seen}: shape {tuple(one.shape)} became {tuple(other.shape)}")
    same = (one == other) | (one.isnan() & other.isnan())
    require_all(same & (one.signbit() == other.signbit()) if one.is_floating_point() else same, seen)


def require_close(one: Tensor, other: Tensor, tolerance: float, seen: str) -> None:
    """Raise a `ConformanceError` unless two tensors agree within a relative and absolute tolerance."""
    require(one.shape == other.shape, f"{seen}: shape {tuple(one.shape)} became {tuple(other.shape)}")
    require_all(one.double().isclose(other.double(), rtol=tolerance, atol=tolerance, equal_nan=True), seen)
