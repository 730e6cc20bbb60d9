"""Compile the decode step once for all tokens of a request."""

import kvcomp
import torch
from tiny_model import build, prompt

model = build()
inputs = {"input_ids": prompt(200)}

# --8<-- [start:generate]
with kvcomp.compress(model, "flowmm", budget=0.25, reserve=64, compiled=True) as cache:
    model.generate(**inputs, past_key_values=cache, max_new_tokens=64, do_sample=False)
# --8<-- [end:generate]

# --8<-- [start:loop]
step = torch.compile(model, backend="aot_eager", fullgraph=True)  # without a backend: inductor, which needs a compiler

with kvcomp.compress(model, "flowmm", budget=0.25, reserve=64, compiled=True) as cache, torch.inference_mode():
    token = model(**inputs, past_key_values=cache).logits[:, -1:].argmax(dim=-1)  # the prompt: not compiled
    for _ in range(16):
        token = step(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(dim=-1)
# --8<-- [end:loop]
print(cache.report().layers[0].tokens)
