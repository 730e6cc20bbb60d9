"""Models with random, seeded weights in the shape of a configuration: time and memory do not depend on what they say.

What does depend on it is what a method keeps, so numbers of accuracy mean nothing here, and a method whose work
depends on the content (a matcher with a threshold) is timed on content that no text has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
)

from kvcomp.core.errors import InputError, UnknownNameError, suggest

VISUAL_SHARE = 0.5
"""How much of a prompt stands for images where the model takes any."""


def _llama(layers: int, heads: int, kv_heads: int, head_dim: int, **sizes: Any) -> Any:
    return LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=heads * head_dim,
        max_position_embeddings=131072,
        eos_token_id=None,
        **sizes,
    )


def _qwen2_5_7b() -> Any:
    return Qwen2Config(**_QWEN_7B, vocab_size=152064, max_position_embeddings=131072, eos_token_id=None)


def _qwen2_5_vl_7b() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {**_QWEN_7B, "vocab_size": 152064, "max_position_embeddings": 128000, "rope_parameters": rope}
    return Qwen2_5_VLConfig(text_config={**text, "eos_token_id": None}, vision_config=_SMALL_VISION)


_QWEN_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
_SMALL_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 3584,
}
"""Stands in for the vision tower, which no benchmark here runs: visual tokens enter as embeddings."""

SHAPES: Mapping[str, Callable[[], Any]] = {
    "llama-6l-64": partial(_llama, 6, 8, 2, 64, intermediate_size=1408, vocab_size=1024),
    "llama-3.1-8b": partial(_llama, 32, 32, 8, 128, intermediate_size=14336, vocab_size=128256),
    "qwen2.5-7b": _qwen2_5_7b,
    "qwen2.5-vl-7b": _qwen2_5_vl_7b,
}
"""Shapes that are known by name; the sizes are those of the published configurations. `llama-6l-64` is ours."""


@dataclass(frozen=True)
class Shape:
    """A model's configuration.

    Attributes:
        name: as it was asked for.
        config: of transformers.
    """

    name: str
    config: Any

    @property
    def multimodal(self) -> bool:
        """Return whether the model takes images."""
        return type(self.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    @property
    def text(self) -> Any:
        """Return the configuration of the part that has a cache."""
        return self.config.get_text_config()

    def describe(self) -> dict[str, Any]:
        """Return what a result file records."""
        text = self.text
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return {
            "name": self.name,
            "model_type": self.config.model_type,
            "layers": text.num_hidden_layers,
            "heads": text.num_attention_heads,
            "kv_heads": text.num_key_value_heads,
            "head_dim": head_dim,
            "hidden_size": text.hidden_size,
            "visual_share": VISUAL_SHARE if self.multimodal else 0.0,
        }

    def prompt(self, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return a seeded random prompt as arguments of a forward, one row of `tokens`.

        A multimodal one is given as embeddings, in stretches of text and of visual tokens, whose kind
        `mm_token_type_ids` tells.
        """
        generator = torch.Generator().manual_seed(tokens)
        if not self.multimodal:
            ids = torch.randint(0, self.text.vocab_size, (1, tokens), generator=generator)
            return {"input_ids": ids.to(device)}
        embeddings = torch.randn(1, tokens, self.text.hidden_size, generator=generator) * 0.02
        stretch = max(1, tokens // 16)
        visual = (torch.arange(tokens) // stretch % 2 == 0)[None]
        return {"inputs_embeds": embeddings.to(device, dtype), "mm_token_type_ids": visual.int().to(device)}


def find_shape(name: str, layers: int | None = None) -> Shape:
    """Return the shape of this name, or of the configuration in a folder.

    Args:
        name: one of `SHAPES`, or the folder of a model (its weights are not read).
        layers: how many layers to build instead of all; what is measured per layer stays, what is in front of and
            behind the layers weighs more.

    Raises:
        UnknownNameError: there is neither.
        InputError: the folder holds no configuration, or of a model that has no cache.
    """
    if name in SHAPES:
        config = SHAPES[name]()
    elif Path(name).expanduser().is_dir():
        config = _read_config(Path(name).expanduser())
    else:
        raise UnknownNameError(f"no shape named {name!r}, nor a folder of a model. {suggest(name, SHAPES)}")
    if layers is not None:
        config = copy.deepcopy(config)
        config.get_text_config().num_hidden_layers = layers
        if getattr(config.get_text_config(), "layer_types", None):
            config.get_text_config().layer_types = config.get_text_config().layer_types[:layers]
    return Shape(name, config)


def _read_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} must hold the configuration of a model: {error}") from error


def build_model(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Return a model of this shape with seeded random weights, in evaluation mode."""
    auto: Any = AutoModelForImageTextToText if shape.multimodal else AutoModelForCausalLM
    before = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        with device:
            model: nn.Module = auto.from_config(shape.config, dtype=dtype)
    except ValueError as error:
        raise InputError(f"a model of shape {shape.name!r} cannot be built: {error}") from error
    finally:
        torch.random.set_rng_state(before)
    return model.eval()
