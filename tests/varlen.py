"""torch's variable-length attention without a GPU: its kernel, which runs on nothing else, played by a loop."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from kvcomp.runtime import packed


def play_varlen(patch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Let packed heads take the path that they take on a GPU; return the windows that it is called with."""
    pytest.importorskip("torch.nn.attention.varlen")
    _register()
    patch.setattr(packed, "_runs_varlen", lambda device: True)
    windows.clear()
    return windows


windows: list[tuple[int, int]] = []


@cache
def _register() -> None:
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu")(_attend)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do as the kernel does, and refuse what it refuses: see `mha_varlen_fwd` of PyTorch's `flash_api.cpp`."""
    assert seqused_k is not None
    assert window_size is not None
    assert {cu_seq_q.dtype, cu_seq_k.dtype, seqused_k.dtype} == {torch.int32}
    assert {query.dtype, key.dtype, value.dtype} in ({torch.float16}, {torch.bfloat16})
    assert len(seqused_k) == len(cu_seq_q) - 1 == len(cu_seq_k) - 1
    assert int(seqused_k.max()) <= max_k
    assert (cu_seq_k[:-1] + seqused_k <= cu_seq_k[1:]).all()
    assert cu_seq_k[-1] == key.shape[0]
    windows.append((window_size[0], window_size[1]))
    output = torch.zeros_like(query)
    for number, (start, end) in enumerate(zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True)):
        first, count = int(cu_seq_k[number]), int(seqused_k[number])
        assert end - start == max_q
        visible = torch.ones(max_q, count, dtype=torch.bool)
        visible = visible.tril(count - max_q) if window_size[1] == 0 else visible
        own = query[start:end].transpose(0, 1).float()  # (group, queries, head_dim)
        keys, values = (entry[first : first + count, 0].float() for entry in (key, value))
        logits = (own @ keys.T * scale).masked_fill(~visible, -1e30)
        output[start:end] = (logits.softmax(dim=-1) @ values).transpose(0, 1).to(query.dtype)
    return output, query.new_zeros(()), query.new_zeros(())
