"""Attention kernels and number formats."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvcomp.testing.envelope.bench import Bench, Inputs, require_same_answer
from kvcomp.testing.envelope.engine import NotClaimedError
from kvcomp.testing.envelope.feature import feature
from kvcomp.testing.failures import require_all, require_close, require_same

HALF_TOLERANCE = 2e-2  # of logits in float16: those of the first token, and of the one that sees slots


def _with_kernel(bench: Bench, name: str) -> Bench:
    """Return the bench with a model that runs this kernel.

    Raises:
        NotClaimedError: the family does not have it.
    """
    model = bench.family.model()
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise NotClaimedError(f"transformers has no {name} for this family: {_first_line(error)}") from None
    return replace(bench, model=model)


def _same_as_sdpa(bench: Bench, name: str) -> None:
    other = _with_kernel(bench, name)
    for inputs, what in ((bench.prompt(), "a prompt"), (bench.padded(), "a padded batch")):
        require_same_answer(other.answer(inputs), bench.answer(inputs), f"{what} with {name}, and with the default")


@feature("eager")
def eager(bench: Bench) -> None:
    """Eager attention gives what the default kernel gives."""
    _same_as_sdpa(bench, "eager")


@feature("flex-attention")
def flex_attention(bench: Bench) -> None:
    """Flex attention gives what the default kernel gives."""
    _same_as_sdpa(bench, "flex_attention")


@feature("flash-attention-2")
def flash_attention_2(bench: Bench) -> None:
    """Flash attention 2 gives what the default kernel gives; on a GPU in float16, up to its rounding."""
    if not torch.cuda.is_available():
        _same_as_sdpa(bench, "flash_attention_2")
        return
    flash = _with_kernel(bench, "flash_attention_2").model
    benches = [replace(bench, model=model.to("cuda", torch.float16)) for model in (flash, bench.family.model())]
    for inputs, what in ((bench.prompt(), "a prompt"), (bench.padded(), "a padded batch")):
        one, other = (made.answer(_on_gpu(inputs, made)).logits[:, :2].float() for made in benches)
        require_close(one, other, HALF_TOLERANCE, f"logits of {what} with flash_attention_2, and with the default")


def _on_gpu(inputs: Inputs, bench: Bench) -> Inputs:
    """Return inputs on the GPU, numbers in the dtype of the bench's model."""
    dtype = bench.model.dtype
    return {name: value.to("cuda", dtype if value.is_floating_point() else None) for name, value in inputs.items()}


def _in_dtype(bench: Bench, dtype: torch.dtype) -> None:
    half = Bench.of(bench.engine, bench.family, bench.family.model().to(dtype))
    require_all(half.answer(half.padded()).logits.isfinite(), "logits of a padded batch must be finite")
    prompt = half.prompt()
    require_same(half.answer(prompt, 1.0).logits, half.stock(prompt).logits, "logits of a prompt at budget 1.0")


@feature("bfloat16")
def bfloat16(bench: Bench) -> None:
    """In bfloat16 the logits are finite, and at budget 1.0 those of the stock cache, bit for bit."""
    _in_dtype(bench, torch.bfloat16)


@feature("float16")
def float16(bench: Bench) -> None:
    """In float16 the logits are finite, and at budget 1.0 those of the stock cache, bit for bit."""
    _in_dtype(bench, torch.float16)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
