"""Build the Qwen2.5-VL architecture at two small sizes, and run its vision tower on many equal images at once."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from kvcomp.minimile.vocabulary import IM_END, IMAGE, PAD, TOKEN_IDS, VIDEO, VISION_END, VISION_START, WORDS

KV_HEADS, VISION_HEADS = 2, 4
INIT_SCALE = 0.05 * sqrt(128)
LOOK_BACK = (1, 2)
"""How many tokens back the heads of the first layer look at first, in turns. A name stands one token before its number
and two before its image, in time.
"""
LOOK_STRENGTH = 5.0
"""Of the biases that make it look there: four fifths of its attention, whatever the tokens are."""


@dataclass(frozen=True)
class Size:
    """How large a testbed is. Every head has 32 dimensions, and two heads hold keys and values.

    Attributes:
        hidden: width of the text tower.
        layers: of the text tower.
        heads: of queries, in each layer.
        feed_forward: width inside the text tower's blocks.
        vision_hidden: width of the vision tower.
        vision_blocks: how deep that tower is.
        vision_feed_forward: width inside its blocks.
        learning_rate: at its highest.
    """

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    vision_hidden: int
    vision_blocks: int
    vision_feed_forward: int
    learning_rate: float

    @property
    def init_deviation(self) -> float:
        """The standard deviation of all matrices at first. With the stock 0.02 a run of XS stalls (measured)."""
        return INIT_SCALE / sqrt(self.hidden)

    def config(self) -> Qwen2_5_VLConfig:
        """Return the configuration of a model of this size."""
        text: dict[str, Any] = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": KV_HEADS,
            "intermediate_size": self.feed_forward,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "vocab_size": len(WORDS),
            "bos_token_id": TOKEN_IDS[PAD],
            "eos_token_id": TOKEN_IDS[IM_END],
            "pad_token_id": TOKEN_IDS[PAD],
        }
        vision: dict[str, Any] = {
            "depth": self.vision_blocks,
            "hidden_size": self.vision_hidden,
            "intermediate_size": self.vision_feed_forward,
            "num_heads": VISION_HEADS,
            "out_hidden_size": self.hidden,
            "fullatt_block_indexes": [self.vision_blocks - 1],
        }
        return Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=TOKEN_IDS[IMAGE],
            video_token_id=TOKEN_IDS[VIDEO],
            vision_start_token_id=TOKEN_IDS[VISION_START],
            vision_end_token_id=TOKEN_IDS[VISION_END],
            tie_word_embeddings=True,
        )


SIZES = {
    "xs": Size(128, 4, 4, 384, vision_hidden=64, vision_blocks=2, vision_feed_forward=128, learning_rate=2e-3),
    "s": Size(256, 6, 8, 704, vision_hidden=192, vision_blocks=4, vision_feed_forward=512, learning_rate=1e-3),
}
"""The vision tower of XS is narrow and shallow, because a wider one costs three times as much per image."""


def build_model(seed: int, size: str = "xs") -> Qwen2_5_VLForConditionalGeneration:
    """Return an untrained model of one of `SIZES` whose matrices are drawn from one seed."""
    model = Qwen2_5_VLForConditionalGeneration(SIZES[size].config())
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=SIZES[size].init_deviation, generator=generator)
    _look_back(model.model.language_model.layers[0].self_attn)
    return model


@torch.no_grad()
def _look_back(attention: Any) -> None:
    """Set the biases of queries and keys so that heads look back as far as `LOOK_BACK` says.

    A rotation by position turns the pair of numbers `i` and `i + head_dim / 2` by `position * theta ** (-2 i /
    head_dim)`. Keys that point along the first of the two, and queries turned back by the wanted distance, agree best
    at that distance. Only the fastest pairs, those of the temporal axis, tell neighbours apart.
    """
    half, rope = attention.head_dim // 2, attention.config.rope_parameters
    pairs = rope["mrope_section"][0]
    speeds = rope["rope_theta"] ** (-torch.arange(pairs) / half)
    keys, queries = (part.bias.view(-1, 2, half) for part in (attention.k_proj, attention.q_proj))
    keys[:, 0, :pairs] = LOOK_STRENGTH
    distances = torch.tensor(LOOK_BACK).repeat(len(queries) // len(LOOK_BACK))
    angles = distances[:, None] * speeds  # (heads, pairs)
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
