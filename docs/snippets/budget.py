"""Set a budget as a ratio, in tokens, and in bytes."""

import kvcomp
import torch
from tiny_model import build, prompt

model, inputs = build(), prompt(200)

# --8<-- [start:spellings]
for budget in (0.2, {"tokens": 64}, "64t", {"bytes": "32KiB"}, "32KiB"):
    with torch.inference_mode(), kvcomp.compress(model, "snapkv", budget=budget) as cache:
        model(inputs, past_key_values=cache)
    report = cache.report()
    print(f"{budget!s:20} {report.layers[0].slots[0]:4.0f} slots per head and layer, {report.allocated_bytes} bytes")
# --8<-- [end:spellings]

# --8<-- [start:faults]
for wrong in (20, 0, "20%"):
    try:
        kvcomp.strategy("snapkv", wrong)
    except kvcomp.BudgetError as error:
        print(error)
# --8<-- [end:faults]

# --8<-- [start:too-small]
try:
    with torch.inference_mode(), kvcomp.compress(model, "snapkv", budget={"bytes": 100}) as cache:
        model(inputs, past_key_values=cache)
except kvcomp.BudgetError as error:
    print(error)
    print(f"the smallest ratio that works here is {error.smallest}")
# --8<-- [end:too-small]
