"""The adapter of every family that says in its inputs or its configuration which tokens are which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvcomp.core.errors import UnsupportedUseError
from kvcomp.core.types import Modality
from kvcomp.runtime.adapter import ModelAdapter

TOKEN_ID_FIELDS = {
    Modality.IMAGE: ("image_token_id", "image_token_index"),
    Modality.VIDEO: ("video_token_id", "video_token_index"),
    Modality.AUDIO: ("audio_token_id", "audio_token_index"),
}
OBSTACLES = {
    "kv_lora_rank": "has multi-head latent attention: its cache holds what keys and values are computed from, which is "
    "compressed already",
    "cross_attention_layers": "looks at images by cross-attention: their keys and values are not among those of the "
    "prompt's tokens",
}
"""Fields of a text configuration that say so, with the reason."""
OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "wo")


class GenericAdapter(ModelAdapter, use="generic"):
    """Reads `mm_token_type_ids` (0 text, 1 image, 2 video, 3 audio) where the processor gives them, else the
    placeholder ids of the config.

    Only the placeholders of patches and frames are non-text; the special tokens around them are text.
    """

    generic = True

    @classmethod
    def matches(cls, config: Any) -> bool:
        """Return True: this is the adapter of last resort."""
        return True

    @property
    def obstacle(self) -> str | None:
        """Return what the configuration says of attention that keeps no keys and values of its own tokens."""
        text = self.config.get_text_config(decoder=True)
        for field, reason in OBSTACLES.items():
            if getattr(text, field, None):
                return reason
        return None

    @property
    def token_ids(self) -> dict[Modality, int]:
        """Return the placeholder token of each modality that the model has."""
        found = {
            modality: next(
                (getattr(self.config, name) for name in names if isinstance(getattr(self.config, name, None), int)),
                None,
            )
            for modality, names in TOKEN_ID_FIELDS.items()
        }
        return {modality: token for modality, token in found.items() if token is not None}

    def modality(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the modality of each new token, `(batch, tokens)` int8, None for a text model."""
        if not self.token_ids:
            return None
        ids, types = inputs.get("input_ids"), inputs.get("mm_token_type_ids")
        embeds = inputs.get("inputs_embeds")
        tokens = ids.shape[1] if ids is not None else embeds.shape[1] if embeds is not None else None
        if types is not None and tokens in (None, types.shape[1]):
            return torch.as_tensor(types).to(torch.int8)
        if ids is None:
            raise UnsupportedUseError(
                "a multimodal model was given inputs_embeds alone, so nothing says which tokens are images; "
                "call the whole model with input_ids, or pass mm_token_type_ids (0 text, 1 image, 2 video, 3 audio)"
            )
        modality = torch.zeros(ids.shape, dtype=torch.int8, device=ids.device)
        for kind, token in self.token_ids.items():
            modality.masked_fill_(ids == token, int(kind))
        return modality

    def output_projection(self, attention: nn.Module) -> Tensor | None:
        """Return the weight of the linear layer that attention ends with, by the names that families give it; None for
        other names, and for weights that are stored as codes or elsewhere until they are needed.
        """
        found = (getattr(attention, name, None) for name in OUTPUT_NAMES)
        layer = next((module for module in found if isinstance(module, nn.Linear)), None)
        held = layer is not None and layer.weight.is_floating_point() and not layer.weight.is_meta
        return layer.weight if layer is not None and held else None
