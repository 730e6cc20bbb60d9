"""Go on with a compressed cache: another turn, many questions, another process."""

import tempfile
from pathlib import Path

import kvcomp
import torch
from tiny_model import build, prompt

model = build()
path = Path(tempfile.mkdtemp()) / "context.safetensors"
context = prompt(200)

# --8<-- [start:turn]
session = kvcomp.attach(model)
cache = session.cache("flowmm", budget=0.25)
said = model.generate(input_ids=context, past_key_values=cache, max_new_tokens=8, do_sample=False)
conversation = torch.cat([said, prompt(12)], dim=1)  # with a processor: its output for the whole conversation
arguments = cache.next_turn(model, input_ids=conversation)
said = model.generate(**arguments, max_new_tokens=8, do_sample=False)
# --8<-- [end:turn]

# --8<-- [start:questions]
cache = session.cache("snapkv", budget=0.25, turns="append")
with torch.inference_mode():
    model(context, past_key_values=cache)  # compressed once
compressed = cache.snapshot()
for question in (prompt(6), prompt(9)):
    asked = torch.cat([context, question], dim=1)
    model.generate(input_ids=asked, past_key_values=cache, max_new_tokens=4, do_sample=False)
    cache.restore(compressed)
# --8<-- [end:questions]
print(cache.get_seq_length())

# --8<-- [start:file]
cache.save(path)
again = kvcomp.load_cache(path, model)  # here, or in another process with the same model
model.generate(input_ids=asked, past_key_values=again, max_new_tokens=4, do_sample=False)
session.detach()
# --8<-- [end:file]
print(again.report().layers[0].tokens)
