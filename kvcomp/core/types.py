"""The data that flows through one layer's pipeline. Everything here is immutable by agreement: parts return new
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcomp.core.rotary import Rotary


class Modality(IntEnum):
    """What a token came from."""

    TEXT = 0
    IMAGE = 1
    VIDEO = 2
    AUDIO = 3


def compared_modality(modality: Tensor) -> Tensor:
    """Return what is compared where modalities are told apart: images and videos are one, the visual tokens of
    the FlowMM paper.
    """
    return modality.masked_fill(modality == Modality.VIDEO, Modality.IMAGE)


class Rule(IntEnum):
    """Which pivots a token may be merged into; images and videos count as one modality."""

    CROSS = 0  # any pivot
    INTRA = 1  # a pivot of its own modality
    HETERO = 2  # a pivot of another modality
    NONE = 3  # no pivot


PROTECTED = 2**15 - 1  # the priority of protected tokens: above every tier


@dataclass(frozen=True)
class SlotForm:
    """What slots are made of before a store makes them smaller.

    Attributes:
        layers: compressed layers of the model.
        kv_heads: KV heads of a layer.
        key_dim, value_dim: numbers of one key and one value.
        itemsize: bytes of a number.
    """

    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    itemsize: int

    @property
    def slot_bytes(self) -> int:
        """Return the bytes of one slot of one head."""
        return (self.key_dim + self.value_dim) * self.itemsize

    @property
    def heads(self) -> int:
        """Return the KV heads of all layers."""
        return self.layers * self.kv_heads


@dataclass(frozen=True, eq=False)
class AttentionBlock:
    """Some rows of exact softmax attention, as the model computes it (its mask, scaling, softcap and sinks).

    Attributes:
        leading: attention to the leading tokens, `(batch, heads, rows, leading)` float32, rows of pads are zero; to the
            tokens after them these rows give none.
        rows: `(batch, rows)` int64, which query each row is, -1 for none.
        row_modality: `(batch, rows)` int8.
        row_valid: `(batch, rows)` bool.
        modality: of the keys, `(batch, kv_heads, tokens)` int8.
        valid: of the keys, `(batch, kv_heads, tokens)` bool.
        columns: of the rows in the attention mask, padding counted, `(batch, rows)` int64.
        key_columns: of the keys, `(batch or 1, kv_heads or 1, tokens)` int64.
        queries: of the rows, `(batch, heads, rows, head_dim)`, after rotary embedding; what pads hold means nothing.
        rotary: how these queries were rotated, for all heads alike; None unless the observation says `rotary`.
        scaling: the model's factor of the logits.
    """

    leading: Tensor
    rows: Tensor
    row_modality: Tensor
    row_valid: Tensor
    modality: Tensor
    valid: Tensor
    columns: Tensor
    key_columns: Tensor
    queries: Tensor
    rotary: Rotary | None = None
    scaling: float = 1.0

    @cached_property
    def probs(self) -> Tensor:
        """Return the attention to all tokens, `(batch, heads, rows, tokens)` float32.

        A copy while rows see the leading tokens only: where zeros change nothing, read `leading`, which is as wide as
        it must be, and use `widened`.
        """
        return self.widened(self.leading)

    @property
    def visible(self) -> Tensor:
        """Return which of the leading tokens each row may see, `(batch, heads, rows, leading)` bool: those that do not
        come after it, be their probability too small for float32, and whatever it gives attention to (images of some
        models see each other).
        """
        heads, seen = self.leading.shape[1], self.leading.shape[-1]
        reached = self.key_columns[:, :, None, :seen] <= self.columns[:, None, :, None]
        reached = reached & self.valid[:, :, None, :seen] & self.row_valid[:, None, :, None]
        return reached.repeat_interleave(heads // reached.shape[1], dim=1) | (self.leading > 0)

    def widened(self, values: Tensor) -> Tensor:
        """Return values of the leading tokens, `(..., leading)`, as those of all tokens, 0 for the rest."""
        missing = self.valid.shape[-1] - values.shape[-1]
        return F.pad(values, (0, missing)) if missing else values


@dataclass(frozen=True)
class Repeat:
    """How the context is fed to the model once more, for a statistic of a second pass.

    Attributes:
        chunk: tokens that are fed at a time.
        overlap: tokens before each later chunk that are fed again with it, so that its first tokens have a context.
        instruction: token ids that are fed before every chunk.
        noise: how many sequences of tokens drawn from the whole vocabulary, as long as the chunk, are fed in the place
            of every chunk; 0 to feed the chunk.
    """

    chunk: int
    overlap: int = 0
    instruction: tuple[int, ...] = ()
    noise: int = 0


@dataclass(frozen=True, eq=False)
class LayerView:
    """What one layer holds when it is compressed: the slots of earlier compressions, then the new tokens.

    Attributes:
        keys: `(batch, kv_heads, tokens, head_dim)`, after rotary embedding.
        values: `(batch, kv_heads, tokens, head_dim)`.
        modality: `(batch, kv_heads, tokens)` int8, a `Modality`.
        valid: `(batch, kv_heads, tokens)` bool, false on padding and empty slots.
        indices: `(batch, kv_heads, tokens)` int32, logical position in the row, padding not counted, -1 where invalid.
        counts: `(batch, kv_heads, tokens)` float32, how many prompt tokens a slot stands for.
        positions: `(axes, batch, kv_heads, tokens)` int32, what the rotary embedding saw; 3 axes for M-RoPE.
        layer: number of this layer.
        layers: number of layers in the model.
        observations: the statistics that the parts declared, by declaration.
        memory: `(batch, ...)`, the `Assignment.memory` of the last compression of this layer; None before the first.
        rotary: how each key was rotated; None unless a part of the strategy reads it (`Part.rotary`).
        output: the output projection W_O of each query head, `(heads, hidden, head_dim)`, aliasing the model's weight;
            None where the model's adapter cannot tell it.

    The tensors of shape `(batch, kv_heads, tokens)` are expanded views (stride 0) as long as the heads agree.
    """

    keys: Tensor
    values: Tensor
    modality: Tensor
    valid: Tensor
    indices: Tensor
    counts: Tensor
    positions: Tensor
    layer: int = 0
    layers: int = 1
    observations: Mapping[Any, Tensor] = field(default_factory=dict)
    memory: Tensor | None = None
    rotary: Rotary | None = None
    output: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return `(batch, kv_heads, tokens)`."""
        batch, kv_heads, tokens = self.keys.shape[:3]
        return batch, kv_heads, tokens

    @cached_property
    def compared_modality(self) -> Tensor:
        """Return what is compared where modalities are told apart, `(batch, kv_heads, tokens)` int8: images and videos
        are one.
        """
        return compared_modality(self.modality)

    @property
    def form(self) -> SlotForm:
        """Return what the slots of the model are made of."""
        dims = self.keys.shape[-1], self.values.shape[-1]
        return SlotForm(self.layers, self.shape[1], *dims, self.keys.element_size())


@dataclass(frozen=True, eq=False)
class Scores:
    """How much each token matters, each field `(batch, kv_heads, tokens)`.

    Attributes:
        values: float32, higher is kept.
        protected: bool, tokens that are kept first and never merged into.
        tiers: int16 from 0, tokens of a higher tier are kept before all of a lower one, whatever their values, and can
            be merged into; None where there is one tier.
    """

    values: Tensor
    protected: Tensor
    tiers: Tensor | None = None

    def priority(self, valid: Tensor) -> Tensor:
        """Return the order before values, `(batch, kv_heads, tokens)` int16: 0 for what is no token, then the tiers
        from 1, `PROTECTED` for what is protected. Of equal priority, the higher value is kept; then the earlier token.
        """
        tiers = torch.zeros_like(valid, dtype=torch.int16) if self.tiers is None else self.tiers
        return torch.where(self.protected, PROTECTED, tiers + 1).masked_fill(~valid, 0)


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What a layer may do, per row: `rule` `(batch,)` int8, `rho` `(batch,)` float32 (NaN where not measured),
    `share` `(batch,)`.
    """

    rule: Tensor
    rho: Tensor
    share: Tensor


@dataclass(frozen=True, eq=False)
class Pivots:
    """Which tokens stay.

    Attributes:
        indices: `(batch, kv_heads, slots)` int64, positions on the token axis of the LayerView, ascending, unique.
        mask: `(batch, kv_heads, slots)` bool, false at the end of heads that keep fewer (their index there is 0);
            None where every head of every row keeps the same number.
        groups: optional `(batch, kv_heads, tokens)` int64, the slot number of the cluster of each token.
    """

    indices: Tensor
    mask: Tensor | None = None
    groups: Tensor | None = None

    def gather(self, per_token: Tensor) -> Tensor:
        """Return `(batch, kv_heads, slots, ...)`: what a `(batch, kv_heads, tokens, ...)` tensor holds at the
        pivots.
        """
        index = self.indices
        if per_token.dim() == 4:
            index = index[..., None].expand(-1, -1, -1, per_token.shape[-1])
        return per_token.gather(2, index)

    def filled(self) -> Tensor:
        """Return `(batch, kv_heads, slots)` bool: the mask, all true where there is none."""
        return torch.ones_like(self.indices, dtype=torch.bool) if self.mask is None else self.mask


@dataclass(frozen=True, eq=False)
class Assignment:
    """Where the tokens that do not stay go: edges from sources to slots.

    Attributes:
        sources: `(batch, kv_heads, others)` int64 token positions, ascending, -1 as padding.
        targets: `(batch, kv_heads, others, fanout)` int64 slot numbers in `Pivots.indices`, -1 for none.
        weights: `(batch, kv_heads, others, fanout)` float32, 1 in sum for a source that has a target, else 0.
        memory: `(batch, ...)`, what the matcher wants to find in `LayerView.memory` at the next compression of this
            layer in this request, such as a running threshold; None for nothing.
    """

    sources: Tensor
    targets: Tensor
    weights: Tensor
    memory: Tensor | None = None

    @property
    def merged(self) -> Tensor:
        """Return `(batch, kv_heads, others)` bool: the sources that have a target."""
        return (self.targets >= 0).any(dim=-1)


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Everything that will happen to one layer, as data. `pivots` is None where nothing is to be done."""

    pivots: Pivots | None
    assignment: Assignment | None
    rho: Tensor


@dataclass(frozen=True, eq=False)
class Guide:
    """What a store may go by when it decides how precisely it holds each slot.

    Attributes:
        limit: `(batch, kv_heads)` int64 on the CPU, the bytes that keys and values of each head of this layer may take.
        importance: `(batch, kv_heads, slots)` float32, the score of each slot, infinite where it is protected.
        observations: the statistics that the store declared, by declaration.
    """

    limit: Tensor
    importance: Tensor
    observations: Mapping[Any, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class CompressedLayer:
    """What one layer keeps.

    `keys`, `values` `(batch, kv_heads, slots, head_dim)`; `indices` int32 (-1 where empty), `counts` float32,
    `modality` int8, each `(batch, kv_heads, slots)`; `positions` `(axes, batch, kv_heads, slots)`; `mask` bool or
    None as in `Pivots`. What was merged and evicted follows from the counts: a slot stands for itself and for what
    was merged into it.
    """

    keys: Tensor
    values: Tensor
    indices: Tensor
    counts: Tensor
    modality: Tensor
    positions: Tensor
    mask: Tensor | None
