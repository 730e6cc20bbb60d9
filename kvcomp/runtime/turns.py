"""The arguments of a later turn, with positions that belong to the cache's own conversation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvcomp.core.errors import InputError, UnsupportedUseError
from kvcomp.runtime.state import LayerState

MEDIA = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
BIDIRECTIONAL = "token_type_ids"  # where given, images (Gemma 3) or the whole prompt (PaliGemma) see what follows


def next_turn_arguments(model: nn.Module, inputs: Mapping[str, Any], layer: LayerState) -> dict[str, Any]:
    """Return the keyword arguments for `generate`, the cache not included.

    Args:
        model: the model.
        inputs: of the whole conversation as the processor gives them, media of earlier turns included.
        layer: the first of the cache.

    Raises:
        InputError: the conversation does not begin with the tokens that the cache has seen, or ends with them.
        UnsupportedUseError: new media in a batch, or of a family that does not say which rows belong to which image.
    """
    ids, seen, next_positions = inputs["input_ids"], layer.seen, layer.upcoming_positions()
    if ids.shape[1] <= seen:
        raise InputError(
            f"the next turn must hold the whole conversation, more than the {seen} tokens that the cache has seen; "
            f"got {ids.shape[1]}"
        )
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise InputError(f"the attention mask must be of all tokens, {tuple(ids.shape)}, got {tuple(mask.shape)}")
    layer.transcript.check_begins(ids, mask)
    arguments = {"input_ids": ids, "attention_mask": mask}
    fresh = _new_media(model, inputs, seen)
    if next_positions is None or not hasattr(getattr(model, "base_model", None), "get_rope_index"):
        return arguments | fresh
    if fresh:
        return arguments | fresh | {"position_ids": _rope_index(model, inputs)}
    tokens = layer.tokens + layer.tail  # as far as the cache knows
    ended = (tokens - mask[:, :seen].sum(dim=1).cpu()).clamp(min=0)  # what rows that had ended were padded with
    return arguments | {"position_ids": _continued(mask, seen, next_positions - ended.to(next_positions.device))}


def _continued(mask: Tensor, seen: int, next_positions: Tensor) -> Tensor:
    """Return `(axes, batch, tokens)`: text positions of the new columns; those before are not looked at again."""
    new = (mask[:, seen:].cumsum(dim=1) - 1).clamp(min=0)
    positions = next_positions.long().expand(3, -1)[..., None] + new.to(next_positions.device)
    return torch.cat([positions.new_zeros(*positions.shape[:2], seen), positions], dim=2)


def _rope_index(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return the positions of the whole conversation, `(axes, batch, tokens)`, from the model's own rule."""
    rule = model.base_model.get_rope_index
    known = inspect.signature(rule).parameters
    given = dict(inputs)
    if "feature_attention_mask" in given:  # Qwen2.5-Omni's rule has names of its own for what its processor gives
        given["audio_seqlens"] = given["feature_attention_mask"].sum(dim=-1)
    if "video_second_per_grid" in given:
        given["second_per_grids"] = given["video_second_per_grid"]
    positions: Tensor = rule(**{name: value for name, value in given.items() if name in known})[0]
    return positions


def _new_media(model: Any, inputs: Mapping[str, Any], seen: int) -> dict[str, Tensor]:
    """Return pixels, and what belongs to them, of the images and videos whose placeholders the cache has not seen."""
    fresh: dict[str, Tensor] = {}
    ids = inputs["input_ids"]
    for kind, (pixels, grid) in MEDIA.items():
        placeholders = ids == getattr(model.config, f"{kind}_token_id", None)
        if inputs.get(pixels) is None or not bool(placeholders[:, seen:].any()):
            continue
        if ids.shape[0] != 1:
            raise UnsupportedUseError(f"later turns with {kind}s need one conversation per cache, got {ids.shape[0]}")
        before, whole = int(placeholders[:, :seen].sum()), int(placeholders.sum())
        if inputs.get(grid) is None:
            fresh |= _new_rows(inputs, pixels, before, whole)
            continue
        patches = inputs[grid].prod(dim=1)
        merged = model.config.vision_config.spatial_merge_size**2
        old = int(((patches // merged).cumsum(dim=0) <= before).sum())
        if old < len(patches):
            fresh |= {pixels: inputs[pixels][int(patches[:old].sum()) :], grid: inputs[grid][old:]}
    return fresh


def _new_rows(inputs: Mapping[str, Any], pixels: str, before: int, whole: int) -> dict[str, Tensor]:
    """Return the rows of pixels that the cache has not seen, of a family without grids.

    Every row stands for as many placeholders.

    Args:
        inputs: of the whole conversation.
        pixels: the name of the pixels, one row for each image or tile of one.
        before: placeholders that the cache has seen.
        whole: placeholders of the whole conversation.

    Raises:
        UnsupportedUseError: rows stand for different numbers, something else belongs to the images, or images see what
            follows in them.
    """
    tokens = inputs["input_ids"].shape
    others = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.shape != tokens} - {pixels}
    others |= inputs.keys() & {BIDIRECTIONAL}
    rows = inputs[pixels].shape[0]
    each, rest = divmod(whole, rows)
    if others or rest or before % each:
        counts = f"{whole} placeholders for {rows} rows, {before} seen"
        given = f"also {', '.join(sorted(others))}" if others else counts
        raise UnsupportedUseError(
            "later turns with new media need a model whose processor gives their grids, or nothing but one row of "
            f"{pixels} per equal number of placeholders; got {given}; give the whole conversation to a new cache"
        )
    return {pixels: inputs[pixels][before // each :]}
