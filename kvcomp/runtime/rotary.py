"""The rotary embeddings that a model's attention was given, column by column, for parts that look at them."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvcomp.core.errors import UnsupportedModelError
from kvcomp.core.rotary import Rotary

ROTATION = "apply_rotary_pos_emb"  # what transformers calls a family's rotation, beside its attention module
TOLERANCE = 2e-2  # between a family's rotation in its own dtype, which may be bfloat16, and ours in float32


class Layout(NamedTuple):
    """Where a family has the two coordinates of a pair: beside each other, or half the rotated coordinates apart."""

    values: bool  # cos and sin are interleaved
    keys: bool  # keys are interleaved


LAYOUTS = (Layout(False, False), Layout(True, True), Layout(False, True))  # as in Llama, Cohere, GLM


Cause = int | Tensor | weakref.ref[Tensor]  # what columns are derived by: a crop, rows of the batch, new embeddings


class RotaryColumns:
    """Cos and sin of every column that a cache has seen, padding counted: one value per pair of coordinates.

    Immutable but for its memory of the last change. All layers of a model are given the same embeddings and change in
    the same way, so what the first layer derives, the others share: columns are kept once per cache, where slots would
    be kept once per layer and head.
    """

    def __init__(self, chunks: tuple[tuple[Tensor, Tensor], ...] = (), layout: Layout = LAYOUTS[0]) -> None:
        self._chunks = chunks  # (1 or batch, columns, pairs) each
        self.layout = layout
        self._derived: tuple[Cause, weakref.ref[RotaryColumns]] | None = None

    @property
    def columns(self) -> int:
        """Return how many columns there are."""
        return sum(cos.shape[1] for cos, _ in self._chunks)

    def extend(self, module: nn.Module, embeddings: Any) -> RotaryColumns:
        """Return the columns with those of one more forward.

        Args:
            module: the attention module.
            embeddings: its `position_embeddings`: cos and sin, `(1 or batch, tokens, rotary_dim)` each.

        Raises:
            UnsupportedModelError: the module rotates in a way that kvcomp does not know.
        """
        cos, sin = _embeddings(module, embeddings)
        return self._once(weakref.ref(cos), lambda: self._extended(module, cos, sin))

    def rows(self, rows: Tensor) -> RotaryColumns:
        """Return the columns of these rows of the batch, `(rows,)` int64."""
        return self._once(
            rows, lambda: self._map(lambda values: values if len(values) == 1 else values[rows.to(values.device)])
        )

    def first(self, columns: int) -> RotaryColumns:
        """Return the first columns."""
        return self._once(columns, lambda: self._map(lambda values: values[:, :columns].clone()))

    def at(self, columns: Tensor) -> Rotary:
        """Return the rotations of tokens by their columns, `(batch, kv_heads, tokens)`; of empty slots, any."""
        alike = columns.shape[1] == 1 or columns.stride(1) == 0
        places = (columns[:, :1] if alike else columns).clamp(0, self.columns - 1).long()
        cos, sin = (_gathered(values, places).expand(*columns.shape, -1) for values in self.joined())
        return Rotary(cos, sin, self.layout.keys)

    def joined(self) -> tuple[Tensor, Tensor]:
        """Return cos and sin of all columns, `(1 or batch, columns, pairs)`."""
        if len(self._chunks) > 1:
            batch = max(len(cos) for cos, _ in self._chunks)
            cos, sin = (
                torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1)
                for parts in zip(*self._chunks, strict=True)
            )
            self._chunks = ((cos, sin),)
        return self._chunks[0]

    def tensors(self) -> list[Tensor]:
        """Return every tensor that is held."""
        return [values for chunk in self._chunks for values in chunk]

    def _extended(self, module: nn.Module, cos: Tensor, sin: Tensor) -> RotaryColumns:
        # One token at position 0 is not turned at all, so the next forward is asked again how pairs lie.
        layout = self.layout if self.columns > 1 else _layout(module, cos, sin)
        chunk = _one_per_pair(cos, layout).clone(), _one_per_pair(sin, layout).clone()
        return RotaryColumns((*self._chunks, chunk), layout)

    def _map(self, change: Callable[[Tensor], Tensor]) -> RotaryColumns:
        cos, sin = self.joined()
        return RotaryColumns(((change(cos), change(sin)),), self.layout)

    def _once(self, cause: Cause, derive: Callable[[], RotaryColumns]) -> RotaryColumns:
        """Return what another layer derived for the same cause, else derive it."""
        derived = self._derived[1]() if self._derived is not None and _same(self._derived[0], cause) else None
        if derived is None:
            derived = derive()
            self._derived = cause, weakref.ref(derived)
        return derived


def attention_modules(decoder: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that are told which layer they are and given rotary embeddings, decoder layers left out."""
    for module in decoder.modules():
        inner = (part for part in module.modules() if part is not module)
        if _takes_embeddings(module) and not any(map(_takes_embeddings, inner)):
            yield module


def _takes_embeddings(module: nn.Module) -> bool:
    named = isinstance(getattr(module, "layer_idx", None), int)
    return named and "position_embeddings" in inspect.signature(module.forward).parameters


def _same(known: Cause, cause: Cause) -> bool:
    if isinstance(known, weakref.ref) and isinstance(cause, weakref.ref):
        return known() is cause()
    if isinstance(known, Tensor) and isinstance(cause, Tensor):  # on a GPU, beams are one tensor for all layers
        return known is cause or (known.is_cpu and cause.is_cpu and torch.equal(known, cause))
    return isinstance(known, int) and known == cause


def _embeddings(module: nn.Module, embeddings: Any) -> tuple[Tensor, Tensor]:
    """Return cos and sin, without a single value where this layer of the model does not rotate."""
    pair = embeddings if isinstance(embeddings, tuple) else ()
    if len(pair) != 2 or any(values.dim() != 3 or values.is_complex() for values in pair):
        raise UnsupportedModelError(
            f"{type(module).__name__} must be given position_embeddings of cos and sin, (batch, tokens, rotary_dim) "
            f"each, got {type(embeddings).__name__}; use a merger that does not turn keys back, such as pivot-mean"
        )
    cos, sin = pair
    return (cos, sin) if getattr(module, "use_rope", True) else (cos[..., :0], sin[..., :0])


def _layout(module: nn.Module, cos: Tensor, sin: Tensor) -> Layout:
    """Return how the family lays out pairs, by trying its own rotation on one token.

    Raises:
        UnsupportedModelError: no layout gives what the family's rotation gives, or there is no such function.
    """
    if cos.shape[-1] == 0:
        return LAYOUTS[0]
    most = int(sin.abs().sum(dim=(0, 2)).argmax())  # the token that is turned most
    cos, sin = cos[:1, most : most + 1], sin[:1, most : most + 1]
    key = torch.linspace(-1.0, 2.0, getattr(module, "head_dim", cos.shape[-1]), dtype=cos.dtype, device=cos.device)
    key = key.square().view(1, 1, 1, -1)
    rotate = getattr(sys.modules[type(module).__module__], ROTATION, None)
    expected = None if rotate is None else _rotated(rotate, key, cos, sin).float()
    for layout in LAYOUTS:
        own_cos, own_sin = (_one_per_pair(values, layout)[:, None] for values in (cos, sin))
        turned = Rotary(own_cos, own_sin, layout.keys).rotate(key)
        if expected is not None and torch.allclose(turned, expected, rtol=TOLERANCE, atol=TOLERANCE):
            return layout
    raise UnsupportedModelError(
        f"{type(module).__name__} rotates keys in a way that kvcomp cannot turn back; use a merger that does not need "
        "to, such as pivot-mean or values-only"
    )


def _rotated(rotate: Callable[..., Any], key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return a key as a family's function turns it, which takes queries and keys, or one of them (Gemma 4)."""
    alone = list(inspect.signature(rotate).parameters).index("cos") == 1
    turned: Tensor = rotate(key, cos, sin) if alone else rotate(key, key, cos, sin)[1]
    return turned


def _one_per_pair(values: Tensor, layout: Layout) -> Tensor:
    """Return each pair's value of `(..., rotary_dim)`, where both coordinates of a pair have it: `(..., pairs)`."""
    return values[..., 0::2] if layout.values else values[..., : values.shape[-1] // 2]


def _gathered(values: Tensor, places: Tensor) -> Tensor:
    """Return `(batch, heads, tokens, pairs)`: what `(1 or batch, columns, pairs)` holds at these columns."""
    index = places.flatten(1)[..., None].expand(-1, -1, values.shape[-1])
    gathered = values.expand(len(places), -1, -1).gather(1, index)
    return gathered.view(*places.shape, values.shape[-1])
