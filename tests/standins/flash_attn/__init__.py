"""A stand-in for the package `flash-attn` 2 in plain torch: the functions that transformers calls, on any device and in
any dtype. Causal means that the last query sees the last key, as it does since version 2.1.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

__version__ = "2.8.0"
calls: list[str] = []  # which functions were called, for tests to see that they were


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """Return the attention of `(batch, tokens, heads, head_dim)`."""
    assert dropout_p == 0.0
    assert alibi_slopes is None
    calls.append("rows")
    return torch.stack(
        [_sequence(*row, softmax_scale, causal, window_size, softcap) for row in zip(q, k, v, strict=True)]
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Return the attention of sequences one after the other, `(tokens of all, heads, head_dim)`."""
    assert dropout_p == 0.0
    assert alibi_slopes is None
    assert block_table is None
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_q[-1]) == len(q)
    assert int(cu_seqlens_k[-1]) == len(k) == len(v)
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q
    assert int(cu_seqlens_k.diff().max()) == max_seqlen_k
    calls.append("sequences")
    queries = torch.split(q, cu_seqlens_q.diff().tolist())
    keys, values = (torch.split(states, cu_seqlens_k.diff().tolist()) for states in (k, v))
    return torch.cat(
        [
            _sequence(*sequence, softmax_scale, causal, window_size, softcap)
            for sequence in zip(queries, keys, values, strict=True)
        ]
    )


def flash_attn_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, **_: object) -> NoReturn:
    """Say that paged attention is not here; transformers imports it all the same."""
    raise NotImplementedError


def _sequence(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    """Return the attention of one sequence, `(tokens, heads, head_dim)`."""
    assert query.shape[1] % keys.shape[1] == 0
    group = query.shape[1] // keys.shape[1]
    keys, values = (states.repeat_interleave(group, dim=1).float() for states in (keys, values))
    scale = query.shape[2] ** -0.5 if scale is None else scale
    logits = torch.einsum("qhd,khd->hqk", query.float(), keys) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    distance = torch.arange(len(keys)) - torch.arange(len(query))[:, None] - (len(keys) - len(query))
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    probs = logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", probs.nan_to_num(), values).to(query.dtype)
