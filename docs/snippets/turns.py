"""Compress a context once, and leave what comes after it alone."""

import kvcomp
import torch
from tiny_model import build, prompt

model = build()

# --8<-- [start:turns]
with torch.inference_mode(), kvcomp.compress(model, "snapkv", budget=0.25, turns="append") as cache:
    model(prompt(200), past_key_values=cache)  # the context: 50 slots stay
    model(prompt(10), past_key_values=cache)  # a question: all of it stays
print(cache.report().layers[0].slots)  # (60.0,)
# --8<-- [end:turns]
assert cache.report().layers[0].slots == (60.0,)

# --8<-- [start:defer]
with torch.inference_mode(), kvcomp.compress(model, "snapkv", budget=0.25, defer=True) as cache:
    for _ in range(4):
        model(prompt(50), past_key_values=cache)  # four chunks of one prompt
    cache.finish()  # compressed as if they had been one
print(cache.report().layers[0].slots)  # (50.0,)
# --8<-- [end:defer]
assert cache.report().layers[0].slots == (50.0,)
