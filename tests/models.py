"""Tiny seeded models built from configurations: nothing is downloaded."""

from __future__ import annotations

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvcomp.testing.families.family import TEXT as FAMILY_TEXT

TEXT = FAMILY_TEXT | {"vocab_size": 96}
IMAGE_TOKEN, VISION_START, VISION_END = 90, 91, 92


def tiny_llama(seed: int = 0) -> PreTrainedModel:
    """Return a Llama of three layers, 4 heads over 2 KV heads."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**TEXT)).eval()


def tiny_qwen3(seed: int = 0) -> PreTrainedModel:
    """Return a Qwen3 of the same size: its head_dim is not hidden / heads, its keys are normalised."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=32)).eval()


def tiny_phi3(seed: int = 0) -> PreTrainedModel:
    """Return a Phi-3 of the same size: only the first half of each head is rotated, queries and keys are projected
    together.
    """
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    return Phi3ForCausalLM(Phi3Config(**TEXT, rope_parameters=rope)).eval()


def tiny_glm(seed: int = 0) -> PreTrainedModel:
    """Return a GLM of the same size: neighbouring coordinates of the first half of each head are rotated."""
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    return GlmForCausalLM(GlmConfig(**TEXT, head_dim=16, rope_parameters=rope)).eval()


def tiny_cohere(seed: int = 0) -> PreTrainedModel:
    """Return a Cohere of the same size: neighbouring coordinates are rotated, by cos and sin in the same order."""
    torch.manual_seed(seed)
    return CohereForCausalLM(CohereConfig(**TEXT)).eval()


def tiny_gemma2() -> PreTrainedModel:
    """Return a Gemma 2 whose logits are capped, all of its layers with full attention."""
    torch.manual_seed(0)
    layers = {"layer_types": ["full_attention"] * 3, "head_dim": 16, "attn_logit_softcapping": 0.5}
    model = Gemma2ForCausalLM(Gemma2Config(**TEXT, **layers)).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(50.0)
    return model


def tiny_gemma3n(seed: int = 0) -> PreTrainedModel:
    """Return a text model of Gemma 3n: every other layer slides, and the last two share the keys of earlier ones."""
    torch.manual_seed(seed)
    own = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "head_dim": 16, "sliding_window": 16}
    own |= {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2}
    own |= {"layer_types": ["sliding_attention", "full_attention"] * 3, "activation_sparsity_pattern": [0.0] * 6}
    return Gemma3nForCausalLM(Gemma3nTextConfig(**{**TEXT, **own}, num_kv_shared_layers=2)).eval()


def tiny_qwen_vl(seed: int = 0) -> PreTrainedModel:
    """Return a Qwen2.5-VL: M-RoPE with three axes, images as runs of placeholder tokens."""
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=93,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        pad_token_id=0,
        eos_token_id=None,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def text_inputs(tokens: int, seed: int = 0, batch: int = 1) -> dict[str, torch.Tensor]:
    """Return a random prompt of ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 80, (batch, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_inputs(images: int = 3, between: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a prompt of text with images of 4 x 4 patches (four visual tokens) between."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for _ in range(images):
        ids += torch.randint(2, 80, (between,), generator=generator).tolist()
        ids += [VISION_START, *[IMAGE_TOKEN] * 4, VISION_END]
    ids += torch.randint(2, 80, (between,), generator=generator).tolist()
    row = torch.tensor([ids])
    return {
        "input_ids": row,
        "attention_mask": torch.ones_like(row),
        "pixel_values": torch.randn(images * 16, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * images),
        "mm_token_type_ids": (row == IMAGE_TOKEN).int(),
    }
