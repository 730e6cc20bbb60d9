"""Compress a first cache: the tutorial's own lines."""

# --8<-- [start:load]
import kvcomp
from kvcomp.core.registry import registry
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = registry.find("testbed", "minimile-xs").value  # a small model that comes with kvcomp
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")  # a CPU is at its best in float32
processor = AutoProcessor.from_pretrained(folder)

sample = registry.find("task", "mini/recall").value.sample("test", 2)
inputs = processor.apply_chat_template(
    [sample.messages()], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
# --8<-- [end:load]

# --8<-- [start:compress]
with kvcomp.compress(model, "flowmm", budget=0.2) as cache:
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=8, do_sample=False)
print(sample.question, processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(cache.report())
# --8<-- [end:compress]

# --8<-- [start:compare]
for recipe in ("full", "flowmm", "random"):
    with kvcomp.compress(model, recipe) as cache:
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=8, do_sample=False)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{recipe:10} {cache.report().allocated_bytes:8} bytes   {answer!r}   (expected {sample.answer!r})")
# --8<-- [end:compare]
