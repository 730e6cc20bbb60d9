"""Flash attention over the slots of a layer, through transformers' own function, which knows rows of tokens and of
padding, and no mask besides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcomp.runtime.forward import Logits
from kvcomp.runtime.grouped import attend_grouped

NAME = "flash_attention_2"
_COLUMNS = "kvcomp_columns"  # on a padding mask: what the queries of its forward see of the columns


def is_flash(base: str) -> bool:
    """Return whether an implementation is flash attention: of the `flash_attn` package, or a kernel of the hub that
    transformers calls in the same way.
    """
    registries = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    return "flash" in base and all(base in functions and functions[base] is functions[NAME] for functions in registries)


def as_tensor(padding: Tensor | None, queries: int) -> Tensor | None:
    """Return the mask over columns, `(batch, 1, queries, columns)` bool; None where it is causal and nothing besides.

    It is computed once for all layers that share the padding mask.

    Args:
        padding: `(batch, columns)` bool, false on padding; or None; or a mask of four dimensions, which is returned.
        queries: number of new tokens, the last columns.
    """
    if padding is None or padding.dim() == 4:
        return padding
    if not hasattr(padding, _COLUMNS):
        columns = torch.arange(padding.shape[1], device=padding.device)
        causal = columns <= columns[padding.shape[1] - queries :, None]
        setattr(padding, _COLUMNS, padding.bool()[:, None, None] & causal)
    return getattr(padding, _COLUMNS)  # type: ignore[no-any-return]


def attend_as(base: str, module: nn.Module, *arguments: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Return what transformers' flash attention gives for a module whose configuration names a base.

    It loads the kernel that the configuration names, and that of an attached model names kvcomp's function.
    """
    named = _Overlay(module, config=_Overlay(module.config, _attn_implementation=base))
    return ALL_ATTENTION_FUNCTIONS[base](named, *arguments, **kwargs)  # type: ignore[no-any-return]


def attend_flash(
    function: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    logits: Logits,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return the attention output `(batch, queries, heads, head_dim)` over slots, the new tokens last.

    Where heads or rows hold different numbers of slots, every (row, KV head) is a sequence of its own. What flash
    attention cannot do is computed as `sdpa` does: slots that weigh more than one token, and a model's own mask.

    Args:
        function: transformers' flash attention.
        module: the attention module.
        query: `(batch, heads, queries, head_dim)`.
        keys: `(batch, kv_heads, slots, head_dim)`.
        values: likewise.
        mask: over slots, `(batch, heads or 1, queries, slots)`; None where every query sees every slot before it.
        padding: as the model gave it: `(batch, columns)` bool, a mask of four dimensions, or None.
        logits: how logits are made.
        kwargs: whatever else the model passes.
    """
    if mask is None:
        return function(module, query, keys, values, None, **kwargs)
    if padding is not None and padding.dim() == 2 and as_tensor(padding, query.shape[2]) is mask:
        return function(module, query, keys, values, padding, **kwargs)
    if mask.dtype != torch.bool or logits.sinks is not None or (padding is not None and padding.dim() == 4):
        wide, steps = mask.expand(-1, query.shape[1], -1, -1), "sdpa" if logits.plain else "eager"
        return attend_grouped(steps, query, keys, values, wide, logits, kwargs.get("dropout", 0.0))[0], None
    return _attend_sequences(function, module, query, keys, values, mask, **kwargs)


def _attend_sequences(
    function: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return the attention output, with every (row, KV head) as a sequence whose heads are those of its query group."""
    batch, heads, queries, head_dim = query.shape
    kv_heads, slots = keys.shape[1:3]
    group, sequences = heads // kv_heads, batch * kv_heads
    filled = mask.expand(batch, heads, queries, slots)[:, ::group, -1]  # the last query sees all that are
    output, _ = function(
        module,
        query.reshape(sequences, group, queries, head_dim),
        keys.reshape(sequences, 1, slots, head_dim),
        values.reshape(sequences, 1, slots, -1),
        filled.reshape(sequences, slots),
        **kwargs,
    )
    output = output.view(batch, kv_heads, queries, group, -1).transpose(1, 2)
    return output.reshape(batch, queries, heads, -1), None


class _Overlay:
    """An object with some attributes replaced, for reading."""

    def __init__(self, owner: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._owner, name)
