"""Families that take images as rows of patches with a grid, in the way of Qwen2-VL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcomp.testing.envelope.bench import Inputs
from kvcomp.testing.families.family import AUDIO, END, IMAGE, START, TEXT, VIDEO, Family, Medium

MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
MARKS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
HYBRID = {
    **TEXT,
    "model_type": "qwen3_5_text",
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "rope_parameters": MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0},
}
"""The text model of Qwen3.5."""
SIDE = 4  # patches of an image each way; two by two of them become a token


def grid_image(patch: int, times: int = 2) -> Medium:
    """Return images of 4 x 4 patches, which become four tokens."""

    def tensors(generator: torch.Generator, count: int) -> Inputs:
        pixels = torch.randn(count * SIDE * SIDE, 3 * times * patch * patch, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, SIDE, SIDE]] * count)}

    return Medium(IMAGE, (START, *[IMAGE] * 4, END), tensors)


def grid_video(patch: int, times: int = 2) -> Medium:
    """Return videos of two frames of 4 x 4 patches, which become one grid and four tokens."""

    def tensors(generator: torch.Generator, count: int) -> Inputs:
        pixels = torch.randn(count * SIDE * SIDE, 3 * times * patch * patch, generator=generator)
        return {
            "pixel_values_videos": pixels,
            "video_grid_thw": torch.tensor([[1, SIDE, SIDE]] * count),
            "video_second_per_grid": torch.ones(count),
        }

    return Medium(VIDEO, (START, *[VIDEO] * 4, END), tensors)


def mel_audio(bins: int, frames: int = 16) -> Medium:
    """Return audio of 16 frames of the mel spectrum, which become four tokens."""

    def tensors(generator: torch.Generator, count: int) -> Inputs:
        spectrum = torch.randn(count, bins, frames, generator=generator)
        return {"input_features": spectrum, "feature_attention_mask": torch.ones(count, frames, dtype=torch.long)}

    return Medium(AUDIO, (97, *[AUDIO] * (frames // 4), 98), tensors)


def type_labels(ids: Tensor) -> Inputs:
    """Return `mm_token_type_ids`: 0 text, 1 image, 2 video, 3 audio."""
    types = (ids == IMAGE).int() + 2 * (ids == VIDEO).int() + 3 * (ids == AUDIO).int()
    return {"mm_token_type_ids": types}


def vision(patch: int, **more: Any) -> dict[str, Any]:
    """Return a vision tower of one layer."""
    return {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": TEXT["hidden_size"],
        "patch_size": patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **more,
    }


WINDOWED = {"window_size": 112, "fullatt_block_indexes": [0]}
POSITIONS = {"num_position_embeddings": 64}

GRID_FAMILIES = (
    Family(
        "qwen2-vl",
        {
            "model_type": "qwen2_vl",
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {
                "depth": 1,
                "embed_dim": 32,
                "hidden_size": 64,
                "num_heads": 2,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            **MARKS,
        },
        (grid_image(14),),
        type_labels,
        note="M-RoPE",
    ),
    Family(
        "qwen2.5-vl",
        {
            "model_type": "qwen2_5_vl",
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": vision(14, **WINDOWED),
            **MARKS,
        },
        (grid_image(14),),
        type_labels,
        note="M-RoPE",
    ),
    Family(
        "qwen3-vl",
        {
            "model_type": "qwen3_vl",
            "text_config": {**TEXT, "head_dim": 16, "rope_parameters": MROPE | {"mrope_interleaved": True}},
            "vision_config": vision(16, deepstack_visual_indexes=[0], **POSITIONS),
            **MARKS,
        },
        (grid_image(16),),
        type_labels,
        note="interleaved M-RoPE; image features enter several layers",
    ),
    Family(
        "qwen3.5",
        {
            "model_type": "qwen3_5",
            "text_config": HYBRID,
            "vision_config": vision(16, **POSITIONS),
            **MARKS,
        },
        (grid_image(16),),
        type_labels,
        note="hybrid: linear attention beside full attention",
    ),
    Family(
        "glm-4v",
        {
            "model_type": "glm4v",
            "text_config": {**TEXT, "rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
            "vision_config": vision(14, image_size=56),
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "image_start_token_id": START,
            "image_end_token_id": END,
            "video_start_token_id": 95,
            "video_end_token_id": 96,
        },
        (grid_image(14),),
        type_labels,
        note="M-RoPE over neighbouring coordinates",
    ),
    Family(
        "qwen2.5-omni",
        {
            "model_type": "qwen2_5_omni_thinker",
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": vision(14, **WINDOWED),
            "audio_config": {
                "num_mel_bins": 16,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 48,
                "d_model": 32,
                "n_window": 8,
                "output_dim": TEXT["hidden_size"],
                "max_source_positions": 64,
            },
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "audio_token_index": AUDIO,
            "vision_start_token_id": START,
            "vision_end_token_id": END,
            "audio_start_token_id": 97,
            "audio_end_token_id": 98,
        },
        (grid_image(14), mel_audio(16), grid_video(14)),
        note="the thinker; four modalities, M-RoPE with audio",
    ),
)
