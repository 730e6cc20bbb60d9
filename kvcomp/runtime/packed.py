"""Attention over packed slots: every head over its own, its group of query heads as rows, nothing padded back."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcomp.core.packed import PackedSlots
from kvcomp.runtime.forward import Logits
from kvcomp.runtime.grouped import probabilities, sink_rows

VARLEN_DTYPES = (torch.float16, torch.bfloat16)
VARLEN_HEAD_DIM = 256  # the largest that flash attention takes
VARLEN_CAPABILITY = (8, 0)  # the oldest GPUs that it runs on
VARLEN_SETTINGS = {"scale", "window_size", "enable_gqa", "seqused_k"}  # those that `_varlen` needs


def can_attend(base: str, slots: PackedSlots, logits: Logits, causal: bool) -> bool:
    """Return whether attention can run over the slots as they lie; else it must run over a padded copy of them.

    On a CPU it always can. On other devices one call per head would leave the device idle, and variable-length
    attention knows no mask but the causal one.

    Args:
        base: name of the attention implementation.
        slots: what the layer holds.
        logits: how logits are made; variable-length attention knows neither softcap nor sinks.
        causal: whether a query sees every slot before it, and nothing weighs them.
    """
    if base == "eager" or slots.keys.device.type == "cpu":
        return True
    return causal and (base == "sdpa" or logits.plain) and _can_vary(slots)


def attend_packed(
    base: str,
    query: Tensor,
    slots: PackedSlots,
    masks: Sequence[Tensor | None],
    logits: Logits,
    dropout: float = 0.0,
    appended: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the attention output `(batch, queries, heads, head_dim)`, and for `eager` the weights.

    Args:
        base: `sdpa`, which knows neither softcap nor sinks, as transformers' own; `eager`; any other is computed as
            `sdpa`, or as `eager` where there is a softcap or sinks.
        query: `(batch, heads, queries, head_dim)`, after rotary embedding.
        slots: what the layer holds, the new tokens last.
        masks: of each (row, KV head) over its own slots, `(1, 1, group * queries or 1, slots)`, bool or additive; None
            where every query sees every slot. Variable-length attention needs none.
        logits: how logits are made.
        dropout: probability that a weight is dropped.
        appended: how many of the appended slots are filled, 0-d int64 on the device, where only the device knows; the
            masks then hide the others.
    """
    if base == "eager":
        return _eager(query, slots, masks, logits, dropout)
    if base != "sdpa" and not logits.plain:
        return _eager(query, slots, masks, logits, dropout)[0], None
    if query.device.type != "cpu":
        return _varlen(query, slots, logits.scaling, slots.appended if appended is None else appended), None
    heads = zip(*_heads(query, slots), masks, strict=True)
    outputs = [
        F.scaled_dot_product_attention(own, keys, values, allowed, dropout, scale=logits.scaling)
        for own, keys, values, allowed in heads
    ]
    return _joined(outputs, query), None


def _heads(query: Tensor, slots: PackedSlots) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Return queries `(1, 1, group * queries, head_dim)`, keys and values `(1, 1, slots, head_dim)` of each (row, KV
    head).
    """
    rows = query.reshape(len(slots.layout.lengths), 1, 1, -1, query.shape[3]).unbind()
    return rows, *slots.sequences()


def own_slots(mask: Tensor, slots: PackedSlots) -> list[Tensor]:
    """Return the mask of each (row, KV head) over its own slots, `(1, 1, group * queries, slots)`.

    Args:
        mask: over the slots of all heads, `(batch, heads, queries, slots)`, empty ones included.
        slots: what the layer holds.
    """
    lengths, width = slots.layout.lengths, slots.layout.width
    rows = mask.reshape(len(lengths), 1, 1, -1, mask.shape[3]).unbind()
    return [
        row if length == width else torch.cat([row[..., :length], row[..., width:]], dim=-1)
        for row, length in zip(rows, lengths, strict=True)
    ]


def _joined(outputs: list[Tensor], query: Tensor) -> Tensor:
    """Return `(batch, queries, heads, head_dim)` of the outputs of each (row, KV head)."""
    batch, heads, queries, _ = query.shape
    return torch.cat(outputs).view(batch, heads, queries, -1).transpose(1, 2).contiguous()


# --- eager: softcap, sinks, and weights that can be looked at ---


def _eager(
    query: Tensor, slots: PackedSlots, masks: Sequence[Tensor | None], logits: Logits, dropout: float
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    rows = sink_rows(query, slots.layout.kv_heads, logits)
    sequences = len(slots.layout.lengths)
    sinks = [None] * sequences if rows is None else rows.reshape(sequences, 1, 1, -1, 1).unbind()
    outputs, weights = [], []
    parts = zip(*_heads(query, slots), masks, sinks, slots.layout.lengths, strict=True)
    for own, keys, values, allowed, sink, length in parts:
        probs = F.dropout(probabilities(own, keys, allowed, sink, logits), dropout).to(query.dtype)
        outputs.append(probs @ values)
        empty = (0, slots.layout.width - length)
        weights.append(torch.cat([F.pad(probs[..., :length], empty), probs[..., length:]], dim=-1))
    return _joined(outputs, query), torch.cat(weights).view(batch, heads, queries, -1)


# --- variable-length attention, on a GPU ---


@cache
def _has_varlen() -> bool:
    """Return whether torch has variable-length attention that takes groups of heads, and sequences with room at their
    ends.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn  # not in every torch that kvcomp works with
    except ImportError:
        return False
    return inspect.signature(varlen_attn).parameters.keys() >= VARLEN_SETTINGS


def _can_vary(slots: PackedSlots) -> bool:
    head_dim = slots.keys.shape[1]
    fits = slots.keys.dtype in VARLEN_DTYPES and head_dim % 8 == 0 and head_dim <= VARLEN_HEAD_DIM
    alike = slots.keys.shape == slots.values.shape
    return fits and alike and _runs_varlen(slots.keys.device) and _has_varlen()


def _runs_varlen(device: torch.device) -> bool:
    """Return whether flash attention has a kernel for a device: its own, for which ROCm builds have another."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= VARLEN_CAPABILITY


def _varlen(query: Tensor, slots: PackedSlots, scaling: float, appended: int | Tensor) -> Tensor:
    """Return the output of one call in which every (row, KV head) is a sequence and its query group the heads.

    Several queries are causal: the new tokens are the last of every sequence. One query sees every slot, and is not
    called causal: only then does the kernel read each key once for the whole group, and share long sequences out.
    """
    from torch.nn.attention.varlen import varlen_attn  # as `can_attend` found

    batch, heads, queries, head_dim = query.shape
    layout, kv_heads = slots.layout, slots.layout.kv_heads
    bounds = F.pad(layout.ends + layout.room, (1, 0))
    used = layout.ends - bounds[:-1] + appended
    grouped = query.view(batch, kv_heads, heads // kv_heads, queries, head_dim).transpose(2, 3)
    output = varlen_attn(
        grouped.reshape(-1, heads // kv_heads, head_dim),
        slots.keys[:, None],
        slots.values[:, None],
        torch.arange(0, (len(used) + 1) * queries, queries, dtype=torch.int32, device=query.device),
        bounds.int(),
        queries,
        max(layout.lengths) + slots.appended,
        scale=scaling,
        window_size=(-1, -1 if queries == 1 else 0),
        enable_gqa=True,
        seqused_k=used.int(),
    )
    assert isinstance(output, Tensor)  # not a pair, which it is where more is asked for
    output = output.view(batch, kv_heads, queries, heads // kv_heads, head_dim).transpose(1, 2)
    return output.reshape(batch, queries, heads, head_dim)
