"""Compress the cache of a tiny random Llama with the plugin's recipe, and with a file that uses its scorer."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvcomp

config = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    eos_token_id=None,
)
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(3, 100, (1, 80))

for strategy in ("hello", Path(__file__).parent / "flowmm-hello.yaml"):
    with kvcomp.compress(model, strategy) as cache:
        model.generate(input_ids=prompt, past_key_values=cache, max_new_tokens=4, do_sample=False)
    print(cache.report())  # noqa: T201
