"""Read a prompt once, and go on from there with several strategies and budgets."""

import kvcomp
import torch
from tiny_model import build, prompt

model = build()

# --8<-- [start:shared]
recipes = ["snapkv", "flowmm", "kvzip"]
session = kvcomp.attach(model)
shared = session.shared_cache(recipes)
with torch.no_grad():
    model(input_ids=prompt(200), past_key_values=shared)  # the only prefill
    read = shared.snapshot()
    for name in recipes:
        for budget in (0.1, 0.5):
            cache = session.cache(name, budget)
            cache.restore(read)
            cache.finish()  # or decode: the first token compresses
            print(name, budget, cache.report().layers[0].slots)
session.detach()
# --8<-- [end:shared]
