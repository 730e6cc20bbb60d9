"""Build a tiny random Llama and a prompt, so that a page's own lines stay short."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def build() -> LlamaForCausalLM:
    """Return a Llama of two layers, 4 heads over 2 KV heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def prompt(tokens: int) -> torch.Tensor:
    """Return a random prompt, `(1, tokens)`."""
    return torch.randint(3, 100, (1, tokens))
