"""Attention over packed slots is softmax attention over each head's own, as loops in float64 compute it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from kvcomp_strategies.stores.ragged import Ragged
from torch import Tensor
from varlen import play_varlen

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


# --- variable-length attention ---


@pytest.mark.parametrize("tokens", [1, 3])
def test_variable_length_attention_is_told_where_sequences_lie(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = play_varlen(monkeypatch)
    slots, query = slots_of(3, torch.bfloat16), queries_of(tokens, torch.bfloat16)
    causal = torch.ones(2, HEADS, tokens, 8, dtype=torch.bool).tril(8 - tokens)
    output = packed._varlen(query, slots, 0.4, slots.appended)
    assert torch.allclose(output.double(), naive(query, slots, causal, Logits(0.4)), atol=0.03)
    assert windows == [(-1, -1 if tokens == 1 else 0)]  # only without a window is the group of a query one block


@pytest.mark.filterwarnings("error")
def test_a_compiled_step_goes_through_variable_length_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    play_varlen(monkeypatch)
    slots, query = slots_of(3, torch.bfloat16), queries_of(1, torch.bfloat16)
    step = torch.compile(lambda appended: packed._varlen(query, slots, 0.4, appended), backend="eager", fullgraph=True)
    assert torch.equal(step(torch.tensor(3)), packed._varlen(query, slots, 0.4, 3))


def test_where_attention_can_run_over_packed_slots() -> None:
    slots = slots_of(1)
    assert can_attend("sdpa", slots, Logits(1.0), causal=False)
    elsewhere = replace(slots, keys=slots.keys.to("meta"))
    assert can_attend("eager", elsewhere, Logits(1.0), causal=False)
    assert not can_attend("sdpa", elsewhere, Logits(1.0), causal=False)
    assert not can_attend("sdpa", elsewhere, Logits(1.0), causal=True)


@pytest.mark.parametrize(
    ("settings", "has"),
    [
        ("*, scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None", True),
        ("*, scale=None, window_size=(-1, -1), seqused_k=None", False),  # as nightly builds before 2.12 had it
        ("is_causal=False, return_aux=None", False),
    ],
)
def test_torch_must_have_every_setting_of_the_kernel(settings: str, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(module, "varlen_attn", eval(f"lambda query, key, value, {settings}: None"))
    packed._has_varlen.cache_clear()
    assert packed._has_varlen() == has
    packed._has_varlen.cache_clear()


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_the_kernel_runs_on_gpus_that_are_new_enough(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert packed._runs_varlen(torch.device("cuda", 0)) == runs
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not packed._runs_varlen(torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_kernel_itself_agrees(tokens: int) -> None:
    slots, query = slots_of(3, torch.bfloat16), queries_of(tokens, torch.bfloat16)
    causal = torch.ones(2, HEADS, tokens, 8, dtype=torch.bool).tril(8 - tokens)
    there, moved = query.cuda(), slots_of(3, torch.bfloat16, "cuda")
    assert can_attend("sdpa", moved, Logits(1.0), causal=True)
    output, _ = attend_packed("sdpa", there, moved, [None] * 4, Logits(0.4))
    assert torch.allclose(output.cpu().double(), naive(query, slots, causal, Logits(0.4)), atol=0.03)
