"""Families that take images as pictures, and give each a fixed number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvcomp.testing.envelope.bench import Inputs
from kvcomp.testing.families.family import END, IMAGE, START, TEXT, Family, Medium
from kvcomp.testing.families.grids import HYBRID, type_labels

SIDE, PATCH = 28, 14  # pixels: two by two patches
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
CLIP = {"model_type": "clip_vision_model", "projection_dim": 32, **TOWER}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER}
LLAMA = {"model_type": "llama", **TEXT}
QWEN2 = {"model_type": "qwen2", **TEXT}


def pictures(tokens: int, side: int = SIDE, crops: int = 0, **more: Callable[[int], Tensor]) -> Medium:
    """Return square images that become this many tokens each.

    Args:
        tokens: placeholders of one image.
        side: in pixels.
        crops: how many pieces each image is cut into, in a dimension of their own; 0 for no such dimension.
        more: further inputs, made for a count of images.
    """

    def tensors(generator: torch.Generator, count: int) -> Inputs:
        shape = (count, crops, 3, side, side) if crops else (count, 3, side, side)
        given = {"pixel_values": torch.randn(shape, generator=generator)}
        return given | {name: make(count) for name, make in more.items()}

    return Medium(IMAGE, (START, *[IMAGE] * tokens, END), tensors)


def sizes(side: int) -> Callable[[int], Tensor]:
    """Return what makes `image_sizes` of square images."""
    return lambda count: torch.tensor([[side, side]] * count)


def patched(side: int, patch: int, pooling: int) -> Medium:
    """Return images as rows of patches with their places, `side` patches each way."""

    def tensors(generator: torch.Generator, count: int) -> Inputs:
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1)
        return {
            "pixel_values": torch.rand(count, side * side, 3 * patch * patch, generator=generator),
            "image_position_ids": places.expand(count, -1, -1),
        }

    return Medium(IMAGE, (START, *[IMAGE] * (side // pooling) ** 2, END), tensors)


def pooled(tokens: int) -> Medium:
    """Return images whose patches are pooled one by one into this many tokens."""

    def tensors(generator: torch.Generator, count: int) -> Inputs:
        return {
            "pixel_values": torch.randn(count, tokens, 3 * PATCH * PATCH, generator=generator),
            "image_token_pooling": torch.arange(tokens)[:, None].repeat(count, 1),
            "image_grids": torch.tensor([[2, 2, 0, 0]] * count),
        }

    return Medium(IMAGE, (START, *[IMAGE] * tokens, END), tensors)


def stripes(side: int, patch: int, shrink: int) -> Medium:
    """Return images of `side` patches each way, all patches of all images in one row; each way `shrink` of them become
    one token.
    """

    def tensors(generator: torch.Generator, count: int) -> Inputs:
        return {
            "pixel_values": torch.randn(1, 3, patch, count * side * side * patch, generator=generator),
            "target_sizes": torch.tensor([[side, side]] * count, dtype=torch.int32),
        }

    return Medium(IMAGE, (START, *[IMAGE] * (side // shrink) ** 2, END), tensors, joined_last=("pixel_values",))


def image_labels(ids: Tensor) -> Inputs:
    """Return `token_type_ids`: 1 where a token stands for an image."""
    return {"token_type_ids": (ids == IMAGE).int()}


PIXEL_FAMILIES = (
    Family(
        "llava-1.5",
        {
            "model_type": "llava",
            "text_config": LLAMA,
            "vision_config": CLIP,
            "image_token_index": IMAGE,
            "image_seq_length": 4,
        },
        (pictures(4),),
    ),
    Family(
        "mobilevlm-v2",
        {
            "model_type": "mobilevlm",
            "text_config": LLAMA,
            "vision_config": {**CLIP, "image_size": 56},
            "image_token_index": IMAGE,
            "projector_side": 2,
        },
        (pictures(4, side=56),),
        note="its class comes with kvcomp",
    ),
    Family(
        "llava-next",
        {
            "model_type": "llava_next",
            "text_config": LLAMA,
            "vision_config": CLIP,
            "image_token_index": IMAGE,
            "image_grid_pinpoints": [[SIDE, SIDE]],
            "image_seq_length": 4,
        },
        (pictures(10, crops=2, image_sizes=sizes(SIDE)),),
        note="an image is itself and its crops",
    ),
    Family(
        "llava-onevision",
        {
            "model_type": "llava_onevision",
            "text_config": QWEN2,
            "vision_config": SIGLIP,
            "image_token_index": IMAGE,
            "video_token_index": 93,
            "image_grid_pinpoints": [[SIDE, SIDE]],
        },
        (pictures(10, crops=2, image_sizes=sizes(SIDE)),),
        note="an image is itself and its crops",
    ),
    Family(
        "internvl",
        {
            "model_type": "internvl",
            "text_config": LLAMA,
            "vision_config": {
                **TOWER,
                "model_type": "internvl_vision",
                "image_size": [56, 56],
                "patch_size": [PATCH, PATCH],
                "use_mean_pooling": False,
            },
            "image_token_id": IMAGE,
            "image_seq_length": 4,
        },
        (pictures(4, side=56),),
        note="with the Llama-type text model of InternVL2.5",
    ),
    Family(
        "gemma3",
        {
            "model_type": "gemma3",
            "text_config": {
                **TEXT,
                "model_type": "gemma3_text",
                "head_dim": 16,
                "query_pre_attn_scalar": 16,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
        },
        (pictures(4),),
        image_labels,
        note="sliding layers keep their own cache; tokens of an image see one another",
    ),
    Family(
        "paligemma",
        {
            "model_type": "paligemma",
            "text_config": {**TEXT, "model_type": "gemma", "head_dim": 16},
            "vision_config": {**SIGLIP, "projection_dim": 64},
            "projection_dim": 64,
            "image_token_index": IMAGE,
            "hidden_size": 64,
        },
        (pictures(4),),
        image_labels,
        note="the prompt sees all of itself, so two turns are held against two turns of the stock cache",
    ),
    Family(
        "idefics3",
        {
            "model_type": "idefics3",
            "text_config": LLAMA,
            "vision_config": {**TOWER, "image_size": 56},
            "scale_factor": 2,
            "image_token_id": IMAGE,
        },
        (pictures(4, side=56, crops=1),),
    ),
    Family(
        "smolvlm",
        {
            "model_type": "smolvlm",
            "text_config": LLAMA,
            "vision_config": {**TOWER, "image_size": 56},
            "scale_factor": 2,
            "image_token_id": IMAGE,
        },
        (pictures(4, side=56, crops=1),),
    ),
    Family(
        "mistral3",
        {
            "model_type": "mistral3",
            "text_config": {**TEXT, "model_type": "mistral", "head_dim": 16, "sliding_window": None},
            "vision_config": {**TOWER, "model_type": "pixtral", "image_size": 56, "head_dim": 16},
            "spatial_merge_size": 2,
            "image_token_index": IMAGE,
        },
        (pictures(4, side=56, image_sizes=sizes(56)),),
    ),
    Family(
        "ovis2",
        {
            "model_type": "ovis2",
            "text_config": QWEN2,
            "vision_config": {
                **TOWER,
                "image_size": 28,
                "vocab_size": 64,
                "hidden_stride": 1,
                "num_visual_indicator_tokens": 5,
            },
            "image_token_id": IMAGE,
            "visual_indicator_token_ids": [95, 96, 97, 98, 99],
            "hidden_size": 64,
            "vocab_size": 128,
        },
        (pictures(4),),
        note="visual tokens are mixtures of words of a visual vocabulary",
    ),
    Family(
        "gemma4",
        {
            "model_type": "gemma4",
            "text_config": {
                **TEXT,
                "model_type": "gemma4_text",
                "head_dim": 16,
                "global_head_dim": 16,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
                "vocab_size_per_layer_input": TEXT["vocab_size"],
                "hidden_size_per_layer_input": 8,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": 4,
                "pooling_kernel_size": 3,
                "position_embedding_size": 64,
            },
            "audio_config": None,
            "image_token_id": IMAGE,
            "video_token_id": 93,
            "audio_token_id": 94,
            "boi_token_id": START,
            "eoi_token_id": END,
        },
        (patched(6, 4, 3),),
        type_labels,
        note="sliding layers keep their own cache",
    ),
    Family(
        "molmo2",
        {
            "model_type": "molmo2",
            "text_config": {**TEXT, "head_dim": 16, "additional_vocab_size": 16},
            "vision_config": {
                **TOWER,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "image_size": [SIDE, SIDE],
                "num_position_embeddings": 4,
            },
            "adapter_config": {
                "vision_feature_layer": [-1],
                "hidden_size": 32,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "intermediate_size": 48,
                "text_hidden_size": TEXT["hidden_size"],
            },
            "image_patch_id": IMAGE,
            "image_start_token_id": START,
            "image_end_token_id": END,
        },
        (pooled(4),),
        type_labels,
        note="image features are added to the placeholders' embeddings; with the stock cache too, padding matters, "
        "so only the row without pads is compared",
    ),
    Family(
        "minicpm-v-4.6",
        {
            "model_type": "minicpmv4_6",
            "text_config": HYBRID,
            "vision_config": {**TOWER, "image_size": 32, "patch_size": 4},
            "insert_layer_id": 0,
            "image_token_id": IMAGE,
            "video_token_id": 93,
        },
        (stripes(8, 4, 4),),
        note="hybrid: linear attention beside full attention",
    ),
)
