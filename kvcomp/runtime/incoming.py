"""Whether the tokens of a forward go on from what a cache has seen, and have reached all of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kvcomp.core.errors import InputError, UnsupportedModelError, UnsupportedUseError
from kvcomp.runtime.layer import CompressedCacheLayer


def given_tokens(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return what stands for the tokens of a forward, `(batch, tokens, ...)`, None where that cannot be told."""
    ids = inputs.get("input_ids")
    return inputs.get("inputs_embeds") if ids is None else ids


def new_token_count(inputs: Mapping[str, Any]) -> int | None:
    """Return how many tokens a forward is given, None where that cannot be told."""
    given = given_tokens(inputs)
    return None if given is None else int(given.shape[1])


def check_incoming(inputs: Mapping[str, Any], rows: int | None, seen: int, *, shared: bool) -> None:
    """Raise where the inputs of a forward do not go with what the cache has seen.

    Args:
        inputs: what the model was called with.
        rows: of the batch that the cache holds, None where it is empty.
        seen: columns that it has seen.
        shared: whether it reads one prompt for several strategies.

    Raises:
        InputError: there is no new token.
        UnsupportedUseError: another number of rows, a mask of another conversation, or a second prompt.
    """
    given = given_tokens(inputs)
    if given is None:
        return
    batch, new = given.shape[:2]
    if not new and seen:
        raise UnsupportedUseError(
            f"a later prompt must hold the whole conversation and more, and this one has no token beyond the {seen} "
            "that the cache has seen; a cache belongs to one conversation, so use a new one for another prompt"
        )
    if not new:
        raise InputError(f"a prompt must have at least one token, got inputs of shape {tuple(given.shape)}")
    if shared and rows is not None and new > 1:
        raise UnsupportedUseError(
            "a shared cache reads its prompt in one forward, and this is a second; restore its snapshot in a cache "
            "of session.cache(strategy), and go on with that"
        )
    if rows is not None and batch != rows:
        raise UnsupportedUseError(
            f"the batch must stay as large as it is: the cache holds {rows} rows, and {batch} were given; call "
            "cache.batch_repeat_interleave or cache.batch_select_indices first, or use a new cache"
        )
    mask, expected = inputs.get("attention_mask"), seen + new
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] != expected:
        raise UnsupportedUseError(
            f"the attention mask covers {mask.shape[1]} tokens, and the cache will have seen {expected} with the "
            "new ones; a cache belongs to one conversation, so use a new one for another prompt"
        )


def check_positions(positions: Tensor, upcoming: Tensor | None) -> None:
    """Raise where several new tokens all lie before what the cache has seen: they belong to another prompt.

    Args:
        positions: of the new tokens, `(axes, batch, tokens)`.
        upcoming: of the next token, `(axes, batch)`, None where positions are columns.

    Raises:
        UnsupportedUseError: they do.
    """
    if upcoming is None or positions.shape[-1] == 1:
        return
    ends = positions.amax(dim=(0, 2)).to(upcoming.device)
    if bool((ends < upcoming.amax(dim=0)).all()):  # one sync per later turn
        raise UnsupportedUseError(
            "the new tokens stand before the end of what the cache has seen; a cache belongs to one conversation, "
            "so use a new one for another prompt"
        )


def check_attended(layers: Mapping[int, CompressedCacheLayer]) -> None:
    """Raise where keys were cached that no attention function of kvcomp saw.

    Raises:
        UnsupportedModelError: naming the layers.
    """
    missed = [number for number, layer in layers.items() if layer.arrived]
    if missed:
        raise UnsupportedModelError(
            f"layers {missed} cached keys that no attention function of kvcomp saw: the model's attention does not "
            "go through transformers' AttentionInterface, or it is not the model that the cache was made for"
        )


def check_room(layers: Mapping[int, CompressedCacheLayer], reserve: int | None) -> None:
    """Raise where decoded tokens found no room.

    Raises:
        UnsupportedUseError: saying how many.
    """
    if lost := max(layer.lost for layer in layers.values()):
        raise UnsupportedUseError(
            f"reserve must be at least the number of tokens that are decoded, got reserve={reserve}, and "
            f"{lost} tokens found no room, so that what was generated since is wrong; reserve more or generate less"
        )
