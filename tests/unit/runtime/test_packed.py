"""Attention over packed slots is softmax attention over each head's own, as loops in float64 compute it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from kvcomp_strategies.stores.ragged import Ragged
from torch import Tensor

from kvcomp.core.packed import PackedSlots
from kvcomp.runtime import packed
from kvcomp.runtime.forward import Logits
from kvcomp.runtime.packed import attend_packed, can_attend, own_slots

LENGTHS, HEADS, GROUP, HEAD_DIM = [[5, 2], [1, 4]], 4, 2, 8


def slots_of(appended: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PackedSlots:
    """Two rows of two KV heads that differ, and what was appended to each."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 2, 5 + appended, HEAD_DIM, generator=generator).to(dtype)
    storage = Ragged().open()
    storage.replace(keys[:, :, :5], values[:, :, :5], torch.arange(5) < torch.tensor(LENGTHS)[..., None])
    if appended:
        storage.append(keys[:, :, 5:], values[:, :, 5:])
    storage.move(torch.device(device))
    slots = storage.packed()
    assert slots is not None
    return slots


def queries_of(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, HEADS, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def naive(query: Tensor, slots: PackedSlots, mask: Tensor | None, logits: Logits) -> Tensor:
    """Return `(batch, queries, heads, head_dim)`, one row, head and query at a time."""
    batch, heads, tokens, _ = query.shape
    output = torch.zeros(batch, tokens, heads, HEAD_DIM, dtype=torch.float64)
    keys, values = slots.sequences()
    for row in range(batch):
        for head in range(heads):
            sequence = row * (heads // GROUP) + head // GROUP
            length = slots.layout.lengths[sequence]
            for place in range(tokens):
                weights = []
                for slot in range(length + slots.appended):
                    key = keys[sequence][0, 0, slot].double()
                    logit = float(query[row, head, place].double() @ key) * logits.scaling
                    if logits.softcap is not None:
                        logit = logits.softcap * math.tanh(logit / logits.softcap)
                    column = slot if slot < length else slots.layout.width + slot - length
                    if mask is not None:
                        allowed = mask[row, head, place, column]
                        logit += (0.0 if bool(allowed) else -1e30) if mask.dtype == torch.bool else float(allowed)
                    weights.append(logit)
                sink = [] if logits.sinks is None else [float(logits.sinks[head])]
                shares = torch.tensor([*weights, *sink], dtype=torch.float64).softmax(dim=0)
                for slot in range(len(weights)):
                    output[row, place, head] += shares[slot] * values[sequence][0, 0, slot].double()
    return output


def masks_of(kind: str, tokens: int, slots: PackedSlots) -> Tensor | None:
    """A mask over slots: none; random, with something visible in every row; or an additive bias."""
    generator = torch.Generator().manual_seed(2)
    shape = (2, HEADS, tokens, slots.layout.width + slots.appended)
    if kind == "none":
        return None
    if kind == "bias":
        return torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.5
    mask[..., 0] = True
    return mask


def sliced(mask: Tensor | None, slots: PackedSlots) -> Sequence[Tensor | None]:
    return [None] * len(slots.layout.lengths) if mask is None else own_slots(mask, slots)


@pytest.mark.parametrize("kind", ["none", "bool", "bias"])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_each_head_attends_to_its_own_slots(base: str, tokens: int, kind: str) -> None:
    slots, query, logits = slots_of(3), queries_of(tokens), Logits(0.4)
    mask = masks_of(kind, tokens, slots)
    output, _ = attend_packed(base, query, slots, sliced(mask, slots), logits)
    assert output.is_contiguous()
    assert torch.allclose(output.double(), naive(query, slots, mask, logits), atol=1e-6)


@pytest.mark.parametrize("logits", [Logits(0.4, softcap=0.5), Logits(0.4, None, torch.tensor([0.0, 2.0, -1.0, 3.0]))])
@pytest.mark.parametrize("tokens", [1, 3])
def test_eager_knows_softcap_and_sinks(tokens: int, logits: Logits) -> None:
    slots, query = slots_of(2), queries_of(tokens)
    mask = masks_of("bias", tokens, slots)
    output, weights = attend_packed("eager", query, slots, sliced(mask, slots), logits)
    assert torch.allclose(output.double(), naive(query, slots, mask, logits), atol=1e-6)
    assert weights is not None
    assert weights.shape == (2, HEADS, tokens, 7)
    assert (weights[0, 2:, :, 2:5] == 0).all()
    whole = 1.0 if logits.sinks is None else 0.999
    assert (weights.sum(dim=-1) <= whole + 1e-6).all()


def test_half_precision_stays_half() -> None:
    slots, query = slots_of(2, torch.bfloat16), queries_of(1, torch.bfloat16)
    for base in ("sdpa", "eager"):
        output, _ = attend_packed(base, query, slots, [None] * 4, Logits(0.4))
        assert output.dtype == torch.bfloat16
        assert torch.allclose(output.double(), naive(query, slots, None, Logits(0.4)), atol=0.03)


def test_dropout_drops() -> None:
    slots, query = slots_of(2), queries_of(1)
    for base in ("sdpa", "eager"):
        assert (attend_packed(base, query, slots, [None] * 4, Logits(0.4), dropout=1.0)[0] == 0).all()


# --- variable-length attention, its kernel played by a loop ---


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    **rest: object,
) -> Tensor:
    """Do as torch's kernel says it does: causal from the end of each sequence, of which `seqused_k` slots count."""
    assert rest["window_size"] == (-1, 0)
    assert rest["enable_gqa"]
    used, scale = rest["seqused_k"], rest["scale"]
    assert isinstance(used, Tensor)
    assert isinstance(scale, float)
    assert {cu_seq_q.dtype, cu_seq_k.dtype, used.dtype} == {torch.int32}
    assert int(used.max()) == max_k
    assert (cu_seq_k[:-1] + used <= cu_seq_k[1:]).all()
    assert cu_seq_k[-1] == key.shape[0]
    output = torch.zeros_like(query)
    for number, (start, end) in enumerate(zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True)):
        first, count = int(cu_seq_k[number]), int(used[number])
        assert end - start == max_q
        visible = torch.ones(max_q, count).tril(count - max_q).bool()
        own = query[start:end].transpose(0, 1)  # (group, queries, head_dim)
        keys, values = (t[first : first + count, 0] for t in (key, value))
        logits = (own @ keys.T * scale).masked_fill(~visible, -1e30)
        output[start:end] = (logits.softmax(dim=-1) @ values).transpose(0, 1)
    return output


@pytest.mark.parametrize("tokens", [1, 3])
def test_variable_length_attention_is_told_where_sequences_lie(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_varlen_attention", lambda: varlen)
    slots, query = slots_of(3), queries_of(tokens)
    causal = torch.ones(2, HEADS, tokens, 8, dtype=torch.bool).tril(8 - tokens)
    output = packed._varlen(query, slots, 0.4, slots.appended)
    assert torch.allclose(output.double(), naive(query, slots, causal, Logits(0.4)), atol=1e-6)


def test_where_attention_can_run_over_packed_slots() -> None:
    slots = slots_of(1)
    assert can_attend("sdpa", slots, Logits(1.0), causal=False)
    elsewhere = replace(slots, keys=slots.keys.to("meta"))
    assert can_attend("eager", elsewhere, Logits(1.0), causal=False)
    assert not can_attend("sdpa", elsewhere, Logits(1.0), causal=False)
    assert not can_attend("sdpa", elsewhere, Logits(1.0), causal=True)


def test_torch_is_asked_once_whether_it_has_the_kernel() -> None:
    kernel = packed._varlen_attention()
    assert kernel is packed._varlen_attention()
    assert kernel is None or callable(kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_kernel_itself_agrees(tokens: int) -> None:
    slots, query = slots_of(3, torch.bfloat16), queries_of(tokens, torch.bfloat16)
    causal = torch.ones(2, HEADS, tokens, 8, dtype=torch.bool).tril(8 - tokens)
    there, moved = query.cuda(), slots_of(3, torch.bfloat16, "cuda")
    assert can_attend("sdpa", moved, Logits(1.0), causal=True)
    output, _ = attend_packed("sdpa", there, moved, [None] * 4, Logits(0.4))
    assert torch.allclose(output.cpu().double(), naive(query, slots, causal, Logits(0.4)), atol=0.03)
