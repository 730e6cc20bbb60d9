"""Build the Qwen2.5-VL architecture at the XS size, and run its vision tower on many equal images at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from kvcomp.minimile.vocabulary import IM_END, IMAGE, PAD, TOKEN_IDS, VIDEO, VISION_END, VISION_START, WORDS

INIT_DEVIATION = 0.05
"""All matrices start from this standard deviation; with the stock 0.02 the run stalls (measured)."""
LOOK_BACK = (1, 2, 1, 2)
"""How many tokens back each head of the first layer looks at first. A name stands one token before its number and two
before its image, in time.
"""
LOOK_STRENGTH = 5.0
"""Of the biases that make it look there: four fifths of its attention, whatever the tokens are."""

TEXT_CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
}
VISION_CONFIG: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 128,
    "fullatt_block_indexes": [1],
}
"""Smaller than the XS of the plan (128 wide, 3 blocks): it costs a third as much per image."""


def build_config() -> Qwen2_5_VLConfig:
    """Return the configuration of `minimile-xs`."""
    text = TEXT_CONFIG | {
        "vocab_size": len(WORDS),
        "bos_token_id": TOKEN_IDS[PAD],
        "eos_token_id": TOKEN_IDS[IM_END],
        "pad_token_id": TOKEN_IDS[PAD],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=dict(VISION_CONFIG),
        image_token_id=TOKEN_IDS[IMAGE],
        video_token_id=TOKEN_IDS[VIDEO],
        vision_start_token_id=TOKEN_IDS[VISION_START],
        vision_end_token_id=TOKEN_IDS[VISION_END],
        tie_word_embeddings=True,
    )


def build_model(seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Return an untrained model whose matrices are drawn from one seed."""
    model = Qwen2_5_VLForConditionalGeneration(build_config())
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=INIT_DEVIATION, generator=generator)
    _look_back(model.model.language_model.layers[0].self_attn)
    return model


@torch.no_grad()
def _look_back(attention: Any) -> None:
    """Set the biases of queries and keys so that each head looks back as far as `LOOK_BACK` says.

    A rotation by position turns the pair of numbers `i` and `i + head_dim / 2` by `position * theta ** (-2 i /
    head_dim)`. Keys that point along the first of the two, and queries turned back by the wanted distance, agree best
    at that distance. Only the fastest pairs, those of the temporal axis, tell neighbours apart.
    """
    half, rope = attention.head_dim // 2, attention.config.rope_parameters
    pairs = rope["mrope_section"][0]
    speeds = rope["rope_theta"] ** (-torch.arange(pairs) / half)
    keys, queries = (part.bias.view(-1, 2, half) for part in (attention.k_proj, attention.q_proj))
    keys[:, 0, :pairs] = LOOK_STRENGTH
    angles = torch.tensor(LOOK_BACK)[:, None] * speeds  # (heads, pairs)
    queries[:, 0, :pairs], queries[:, 1, :pairs] = LOOK_STRENGTH * angles.cos(), -LOOK_STRENGTH * angles.sin()


def image_features(visual: Any, pixel_values: Tensor) -> Tensor:
    """Return what the stock vision tower returns for 56 x 56 images, without its Python loop over images.

    Args:
        visual: the `Qwen2_5_VisionTransformerPretrainedModel` inside the model.
        pixel_values: patches as the image processor lays them out (images * 16, 1176).

    Returns:
        One feature per visual token (images * 4, hidden).
    """
    config = visual.config
    states = F.linear(pixel_values, visual.patch_embed.proj.weight.flatten(1))  # (images * 16, width)
    cos, sin = visual.rotary_pos_emb(states, _patch_positions())  # (16, head_dim)
    for block in visual.blocks:
        normed = block.norm1(states)
        queries, keys, values = _split_heads(block.attn.qkv(normed), config.num_heads)
        queries, keys = _rotate(queries, cos, sin), _rotate(keys, cos, sin)
        mixed = F.scaled_dot_product_attention(queries, keys, values)  # (images, heads, 16, head_dim)
        states = states + block.attn.proj(mixed.transpose(1, 2).reshape(states.shape))
        states = states + block.mlp(block.norm2(states))
    merged: Tensor = visual.merger(states)
    return merged


def _patch_positions() -> Tensor:
    """Return row and column of the 16 patches of an image, visual token by visual token (16, 2)."""
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    grid = torch.stack([rows, columns], dim=-1).view(2, 2, 2, 2, 2)
    return grid.transpose(1, 2).reshape(16, 2)


def _split_heads(states: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    split = states.view(-1, 16, 3, heads, states.shape[-1] // 3 // heads)
    queries, keys, values = split.permute(2, 0, 3, 1, 4)
    return queries, keys, values


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin
