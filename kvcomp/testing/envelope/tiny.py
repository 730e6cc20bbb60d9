"""Families of the envelope that need nothing but transformers: tiny seeded models and prompts made by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from kvcomp.testing.envelope.bench import Inputs
from kvcomp.testing.envelope.engine import NotClaimedError

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
IMAGE, START, END = 90, 91, 92
ORDINARY = (2, 80)  # tokens without a meaning of their own
LENGTHS = (44, 17, 29)  # of the prompts of seeds 0, 1, 2
IMAGES = (3, 1, 2)
PATCHES, PATCH_SIZE = 16, 3 * 2 * 14 * 14  # of an image: 4 x 4 patches, which are four tokens


def llama() -> Any:
    """Return a Llama of three layers, 4 heads over 2 KV heads."""
    return LlamaForCausalLM(LlamaConfig(**TEXT))


def qwen2_5_vl() -> Any:
    """Return a Qwen2.5-VL of the same size: M-RoPE with three axes, images as runs of placeholder tokens."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=93,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


@dataclass(frozen=True)
class TinyFamily:
    """A tiny model and its prompts. `images` is whether it takes images, in the way of Qwen2.5-VL."""

    name: str
    build: Callable[[], Any]
    images: bool = False

    def model(self) -> Any:
        """Return the model: the same weights every time, and the caller's random state as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build().eval()

    def prompt(self, seed: int, media: bool = True) -> Inputs:
        """Return the prompt of a seed: text, with images between where the family takes them."""
        if not (self.images and media):
            ids = _words(seed, LENGTHS[seed % len(LENGTHS)])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        images = IMAGES[seed % len(IMAGES)]
        pieces = [piece for image in range(images) for piece in (_words(seed + 10 * image, 5), _PLACE)]
        return _with_images(torch.cat([*pieces, _words(seed + 99, 5)], dim=1), _pixels(seed, images))

    def longer(self, inputs: Mapping[str, Tensor], new: Tensor, media: bool = False) -> Inputs:
        """Return the inputs of the whole conversation."""
        if media and not self.images:
            raise NotClaimedError("the family takes text alone")
        ids = torch.cat([inputs["input_ids"], new, *([_PLACE, _words(5, 3)] if media else [])], dim=1)
        if "pixel_values" not in inputs:
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        more = [_pixels(77, 1)] if media else []
        return _with_images(ids, torch.cat([inputs["pixel_values"], *more]))


_PLACE = torch.tensor([[START, *[IMAGE] * 4, END]])


def _words(seed: int, tokens: int) -> Tensor:
    return torch.randint(*ORDINARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def _pixels(seed: int, images: int) -> Tensor:
    return torch.randn(images * PATCHES, PATCH_SIZE, generator=torch.Generator().manual_seed(seed))


def _with_images(ids: Tensor, pixels: Tensor) -> Inputs:
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * (len(pixels) // PATCHES)),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


TINY: dict[str, TinyFamily] = {
    family.name: family for family in (TinyFamily("llama", llama), TinyFamily("qwen2.5-vl", qwen2_5_vl, images=True))
}
