"""Serve several requests from one model, each with its own cache."""

from concurrent.futures import ThreadPoolExecutor

import kvcomp
import torch
from tiny_model import build, prompt
from transformers import DynamicCache

model = build()

# --8<-- [start:server]
session = kvcomp.attach(model)  # once, when the server starts
strategy = kvcomp.strategy("flowmm", budget={"tokens": 32})  # built once, shared by all requests


def serve(inputs: torch.Tensor) -> str:
    """Answer one request with a cache of its own."""
    cache = session.cache(strategy, reserve=16)  # room for 16 decoded tokens, taken at once
    model.generate(input_ids=inputs, past_key_values=cache, max_new_tokens=16, do_sample=False)
    report = cache.report()
    return f"{report.layers[0].tokens[0]} tokens in {report.layers[0].slots[0]:.0f} slots"


with ThreadPoolExecutor(2) as pool:
    print(list(pool.map(serve, [prompt(60), prompt(90), prompt(120)])))

stock = model.generate(input_ids=prompt(60), past_key_values=DynamicCache(config=model.config), max_new_tokens=4)
session.detach()  # when the server stops: the model is as it was
# --8<-- [end:server]
print(tuple(stock.shape))
