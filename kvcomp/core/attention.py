"""Exact rows of the model's attention, streamed in blocks to the observations that the parts declared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from kvcomp.core.interfaces import Observation
from kvcomp.core.rotary import Rotary
from kvcomp.core.types import AttentionBlock

BLOCK_ELEMENTS = 2**20  # probabilities alive at a time on a CPU: 4 MiB of float32, so that a block stays in its caches
BLOCK_ELEMENTS_ACCELERATOR = 2**26  # 256 MiB elsewhere, so that a block fills the device


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """What one layer's attention saw.

    Attributes:
        queries: `(batch, heads, queries, head_dim)`, after rotary embedding.
        keys: `(batch, kv_heads, tokens, head_dim)`, likewise.
        query_columns: `(queries,)` or `(batch, queries)` int64, the column (padding counted) of each query.
        key_columns: `(batch or 1, kv_heads or 1, tokens)` int64.
        query_modality, query_valid: `(batch, queries)` int8 and bool.
        modality, valid: of the keys, `(batch, kv_heads, tokens)` int8 and bool.
        mask: `(batch or 1, heads or 1, queries, tokens)`, bool or additive; None means causal by columns.
        scaling: factor of the logits.
        softcap: cap of the logits, or None.
        sinks: `(heads,)` extra logits that take probability and have no key, or None.
        rotary: of the queries, `(batch, 1, queries, pairs)`; None where no observation reads it.
    """

    queries: Tensor
    keys: Tensor
    query_columns: Tensor
    key_columns: Tensor
    query_modality: Tensor
    query_valid: Tensor
    modality: Tensor
    valid: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    rotary: Rotary | None = None


def observe(inputs: AttentionInputs, observations: Iterable[Observation]) -> dict[Observation, Tensor]:
    """Return the result of each observation. Those that need all rows share one pass, without probabilities where none
    of them reads any.

    Memory beyond the inputs is one block of rows and the states; a float32 copy of the keys.
    """
    observations = tuple(dict.fromkeys(observations))
    if not observations:
        return {}
    passes: dict[Observation | bool, tuple[Tensor | None, list[Observation]]] = {}
    for observation in observations:
        rows = observation.rows(inputs.query_valid, inputs.query_modality)
        shared: Observation | bool = observation.queries_only if rows is None else observation
        passes.setdefault(shared, (rows, []))[1].append(observation)
    results: dict[Observation, Tensor] = {}
    keys = inputs.keys.float().transpose(-1, -2).contiguous()  # (batch, kv_heads, head_dim, tokens): a faster product
    for rows, members in passes.values():
        states: dict[Observation, Any] = dict.fromkeys(members)
        for block in _blocks(inputs, keys, rows, all(observation.queries_only for observation in members)):
            for observation in members:
                states[observation] = observation.update(states[observation], block)
        results |= {observation: observation.result(states[observation]) for observation in members}
    return results


def _blocks(inputs: AttentionInputs, keys: Tensor, rows: Tensor | None, queries_only: bool) -> Iterator[AttentionBlock]:
    batch, heads, new, _ = inputs.queries.shape
    tokens, on_cpu = keys.shape[3], keys.device.type == "cpu"
    wanted = torch.arange(new, device=keys.device).expand(batch, new) if rows is None else rows
    elements = BLOCK_ELEMENTS if on_cpu else BLOCK_ELEMENTS_ACCELERATOR
    size = max(1, elements // (batch * heads * tokens))
    for start in range(0, wanted.shape[1], size):
        chunk = wanted[:, start : start + size]
        queried = chunk.clamp(min=0)
        valid = (chunk >= 0) & inputs.query_valid.gather(1, queried)
        span = _span(inputs, queried, start if rows is None else None)
        index = queried[:, None, :, None].expand(-1, heads, -1, inputs.queries.shape[3])
        queries = inputs.queries.gather(2, index)
        if queries_only:
            probs = queries.new_empty(*queries.shape[:3], 0, dtype=torch.float32)
        else:
            probs = _probabilities(inputs, keys, queries, queried, span)
            if not (on_cpu and bool(valid.all())):  # elsewhere a look would wait for the device
                probs = probs.masked_fill_(~valid[:, None, :, None], 0.0)
        yield AttentionBlock(
            leading=probs,
            rows=chunk,
            row_modality=inputs.query_modality.gather(1, queried),
            row_valid=valid,
            modality=inputs.modality,
            valid=inputs.valid,
            columns=inputs.query_columns.expand(batch, -1).gather(1, queried),
            key_columns=inputs.key_columns,
            queries=queries,
            rotary=None if inputs.rotary is None else inputs.rotary.rows(queried),
            scaling=inputs.scaling,
        )


def _span(inputs: AttentionInputs, queried: Tensor, start: int | None) -> slice:
    """Return which keys are hidden from some of these queries and seen by others: all before are seen by all of them,
    all after by none.

    Args:
        inputs: what the attention saw.
        queried: `(batch, rows)`, which queries they are.
        start: the first of them where they are the same consecutive ones in every row, else None.
    """
    before = inputs.keys.shape[2] - inputs.queries.shape[2]  # without a mask, the new tokens are the last of the keys
    if inputs.mask is not None or (start is None and queried.device.type != "cpu"):  # a look would wait for the device
        return slice(0, inputs.keys.shape[2])
    if start is None:
        return slice(before + int(queried.min()), before + int(queried.max()) + 1)
    return slice(before + start, before + start + queried.shape[1])


def _probabilities(inputs: AttentionInputs, keys: Tensor, queries: Tensor, rows: Tensor, span: slice) -> Tensor:
    """Return the softmax of these query rows over the keys up to the end of the span, `(batch, heads, rows, keys)`
    float32.

    Args:
        inputs: what the attention saw.
        keys: of all tokens, transposed, `(batch, kv_heads, head_dim, tokens)` float32.
        queries: of these rows, `(batch, heads, rows, head_dim)`.
        rows: `(batch, rows)`, which queries they are.
        span: which keys are hidden from some of them.
    """
    grouped = rearrange(
        queries.float() * inputs.scaling, "b (kv group) rows d -> b kv (group rows) d", kv=keys.shape[1]
    )
    logits = grouped @ keys[..., : span.stop]
    logits = rearrange(logits, "b kv (group rows) keys -> b (kv group) rows keys", rows=rows.shape[1])
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    logits = _masked(inputs, logits, rows, span)
    if inputs.sinks is None:
        return logits.softmax(dim=-1)
    sinks = inputs.sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    return torch.cat([logits, sinks], dim=-1).softmax(dim=-1)[..., :-1]


def _masked(inputs: AttentionInputs, logits: Tensor, rows: Tensor, span: slice) -> Tensor:
    """Return the logits with what a query may not see at the lowest float (a row of pads stays finite)."""
    lowest = torch.finfo(logits.dtype).min
    if inputs.mask is None:
        group = logits.shape[1] // inputs.key_columns.shape[1] if inputs.key_columns.shape[1] > 1 else 1
        key_columns = inputs.key_columns[..., span].repeat_interleave(group, dim=1)[:, :, None]
        query_columns = inputs.query_columns.expand(rows.shape[0], -1).gather(1, rows)
        hidden = key_columns > query_columns[:, None, :, None]  # (batch, heads, rows, keys of the span)
        logits[..., span].masked_fill_(hidden, lowest)
        return logits
    mask = inputs.mask.expand(rows.shape[0], -1, -1, -1)
    mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
    return logits.masked_fill_(~mask, lowest) if mask.dtype == torch.bool else (logits + mask).clamp_(min=lowest)
