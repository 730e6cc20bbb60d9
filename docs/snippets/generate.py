"""Generate in batches, with beams and samples, and go back after a forward that did not end."""

import kvcomp
import torch
from tiny_model import build, prompt

model = build()
long, short = prompt(60), prompt(20)

# --8<-- [start:batch]
ids = torch.cat([long, torch.cat([torch.zeros(1, 40, dtype=torch.long), short], dim=1)])  # padded on the left
mask = (ids != 0).long()
with kvcomp.compress(model, "flowmm", budget=0.2) as cache:
    model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=1, do_sample=False)
print(cache.report().layers[0].slots)  # (12.0, 4.0): a fifth of each row's own tokens
# --8<-- [end:batch]
assert cache.report().layers[0].slots == (12.0, 4.0)

# --8<-- [start:beams]
with kvcomp.compress(model, "flowmm", budget=0.2) as cache:
    best = model.generate(long, past_key_values=cache, max_new_tokens=8, num_beams=4, num_return_sequences=2)
with kvcomp.compress(model, "flowmm", budget=0.2) as cache:
    drawn = model.generate(long, past_key_values=cache, max_new_tokens=8, do_sample=True, num_return_sequences=3)
# --8<-- [end:beams]
print(len(best), "beams,", len(drawn), "samples")

# --8<-- [start:answers]
with torch.inference_mode(), kvcomp.compress(model, "flowmm", budget=0.2) as cache:
    model(long, past_key_values=cache)  # the context, once
    cache.batch_repeat_interleave(3)  # three answers from here
    model(prompt(3).T, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([0, 2]))  # two of them go on
    model(prompt(2).T, past_key_values=cache)
    cache.crop(-1)  # and both take back their last token
print(cache.report().layers[0].tokens)  # (61, 61)
# --8<-- [end:answers]
assert cache.report().layers[0].tokens == (61, 61)

# --8<-- [start:drafts]
try:
    with kvcomp.compress(model, "flowmm", budget=0.2) as cache:
        model.generate(input_ids=long, past_key_values=cache, max_new_tokens=8, prompt_lookup_num_tokens=3)
except kvcomp.UnsupportedUseError as error:
    print(error)  # before the model has run
# --8<-- [end:drafts]
assert not cache.used


def fail(*_: object) -> None:
    """Raise in the middle of the model."""
    raise KeyboardInterrupt


# --8<-- [start:interrupted]
with torch.inference_mode(), kvcomp.compress(model, "flowmm", budget=0.2) as cache:
    model(long, past_key_values=cache)
    before = cache.snapshot()
    handle = model.model.layers[1].register_forward_pre_hook(fail)
    try:
        model(short, past_key_values=cache)
    except KeyboardInterrupt:
        cache.restore(before)  # without this, the cache refuses to go on
    handle.remove()
    model(short, past_key_values=cache)
# --8<-- [end:interrupted]
assert cache.report().layers[0].tokens == (80,)
