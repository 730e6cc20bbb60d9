"""Remember where every token of a prompt lives."""

import kvcomp
import torch
from tiny_model import build, prompt

model, inputs = build(), prompt(24)

# --8<-- [start:trace]
trace = kvcomp.Trace()
with torch.inference_mode(), kvcomp.compress(model, "d2o", budget=0.4, watcher=trace) as cache:
    model(inputs, past_key_values=cache)

homes = trace.homes[0][0, 0].tolist()  # layer 0, row 0, KV head 0: the token in whose slot each token lives
print("kept:", [token for token, home in enumerate(homes) if home == token])
print("merged:", {token: home for token, home in enumerate(homes) if home not in (token, -1)})
print("evicted:", homes.count(-1))
# --8<-- [end:trace]
