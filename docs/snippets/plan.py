"""Run a strategy by hand on random tensors: no model, no transformers."""

import kvcomp
import torch

batch, kv_heads, tokens, head_dim = 1, 2, 40, 16
shape = (batch, kv_heads, tokens)
layer = kvcomp.LayerView(
    keys=torch.randn(*shape, head_dim),
    values=torch.randn(*shape, head_dim),
    modality=torch.zeros(shape, dtype=torch.int8),
    valid=torch.ones(shape, dtype=torch.bool),
    indices=torch.arange(tokens, dtype=torch.int32).expand(shape),
    counts=torch.ones(shape),
    positions=torch.arange(tokens, dtype=torch.int32).expand(1, *shape),
)

# --8<-- [start:plan]
strategy = kvcomp.strategy({"budget": 0.25, "scorer": "position", "selector": "top-k"})
plan = strategy.plan(layer)  # what would happen, as data
print(plan.pivots.indices[0, 0].tolist())  # [0, 1, 2, 3, 34, 35, 36, 37, 38, 39]
compressed = strategy.apply(layer, plan)  # new tensors; `layer` is as it was
print(tuple(compressed.keys.shape))  # (1, 2, 10, 16)
# --8<-- [end:plan]
assert plan.pivots.indices[0, 0].tolist() == [0, 1, 2, 3, 34, 35, 36, 37, 38, 39]
assert compressed.keys.shape == (1, 2, 10, 16)
