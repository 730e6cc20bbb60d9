# The pages show the marked sections; a test runs the whole file.
# --8<-- [start:folder]
model=$(python -c "from kvcomp.core.registry import registry; print(registry.find('testbed', 'minimile-xs').value)")
# --8<-- [end:folder]
python - <<'PYTHON'
from PIL import Image

from kvcomp.core.registry import registry

sample = registry.find("task", "mini/image_needle").value.sample("test", 0)
images = [part for part in sample.context if isinstance(part, Image.Image)]
for name, image in zip(("first.png", "second.png"), images):
    image.save(name)
PYTHON
cp "$SNIPPETS/my-method.yaml" .
# --8<-- [start:run]
kvcomp run --model "$model" --image first.png --image second.png --prompt "code ?" --budget 0.2
# --8<-- [end:run]
# --8<-- [start:options]
kvcomp run --model "$model" --prompt "code ?" --strategy my-method.yaml --set policy.threshold=0.2
kvcomp run --model "$model" --prompt "code ?" --strategy snapkv --budget 16t --json > answer.json
# --8<-- [end:options]
# --8<-- [start:check]
kvcomp check my-method.yaml
# --8<-- [end:check]
