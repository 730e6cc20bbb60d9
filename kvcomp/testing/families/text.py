"""Families that take text alone."""

from __future__ import annotations

from kvcomp.testing.families.family import TEXT, Family

HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

TEXT_FAMILIES = (
    Family("llama", {"model_type": "llama", **TEXT}),
    Family(
        "qwen3", {"model_type": "qwen3", **TEXT, "head_dim": 32}, note="head_dim is not hidden / heads; normalised keys"
    ),
    Family("phi3", {"model_type": "phi3", **TEXT, "rope_parameters": HALF}, note="half of each head is rotated"),
    Family("mistral", {"model_type": "mistral", **TEXT, "sliding_window": None}),
    Family(
        "gemma2",
        {"model_type": "gemma2", **TEXT, "head_dim": 16, "sliding_window": 16},
        note="half of the layers slide; soft-capped scores",
    ),
    Family(
        "lfm2",
        {"model_type": "lfm2", **TEXT, "layer_types": ["conv", "full_attention", "full_attention"]},
        note="hybrid: short convolutions beside attention",
    ),
    Family(
        "qwen3-next",
        {
            "model_type": "qwen3_next",
            **TEXT,
            "head_dim": 16,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "layer_types": ["linear_attention", "full_attention", "full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
        note="hybrid: linear attention beside full attention, gated",
    ),
)
