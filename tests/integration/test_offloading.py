"""Models whose weights live elsewhere until a layer needs them."""

import pytest
import torch
from inference import generate, generate_compressed, left_padded
from models import image_inputs, text_inputs, tiny_llama, tiny_qwen_vl

import kvcomp

accelerate = pytest.importorskip("accelerate", reason="device maps and offloading need accelerate")
BATCH = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (50, 20)])

RECIPES = {name: kvcomp.strategy(name, 0.8 if name == "kivi" else 0.4) for name in ("flowmm", "vl-cache", "kivi")}
RECIPES["unrotated"] = kvcomp.strategy("flowmm", 0.4, merger={"use": "unrotated", "merger": {"use": "mean"}})


@pytest.mark.parametrize("recipe", RECIPES)
def test_offloaded_weights_change_nothing(recipe, tmp_path):
    expected, reference = generate_compressed(tiny_llama(), BATCH, RECIPES[recipe])
    model = accelerate.cpu_offload(tiny_llama(), execution_device=torch.device("cpu"))
    assert next(model.model.layers[0].self_attn.parameters()).is_meta
    output, cache = generate_compressed(model, BATCH, RECIPES[recipe])
    assert torch.equal(output.sequences, expected.sequences)
    assert cache.report().layers == reference.report().layers
    cache.save(tmp_path / "cache")
    loaded = kvcomp.load_cache(tmp_path / "cache", model)
    assert [layer.keys.device.type for layer in loaded.layers] == ["cpu"] * 3


def test_a_model_from_disk_with_images_goes_on_in_a_second_turn(tmp_path):
    inputs, devices = image_inputs(), {"model.visual": "cpu", "model.language_model": "disk", "lm_head": "cpu"}
    model = accelerate.dispatch_model(tiny_qwen_vl(), devices, main_device="cpu", offload_dir=tmp_path)
    outputs = []
    for each in (model, tiny_qwen_vl()):
        with kvcomp.compress(each, "flowmm", budget=0.4) as cache:
            first = generate(each, inputs, cache, 4).sequences
            turn = {"input_ids": torch.cat([first, torch.tensor([[7, 8, 9]])], dim=1)}
            outputs.append(each.generate(**cache.next_turn(each, **turn), max_new_tokens=4, do_sample=False))
    assert torch.equal(*outputs)


def test_a_recipe_that_reads_weights_says_that_they_are_elsewhere():
    model = accelerate.cpu_offload(tiny_llama(), execution_device=torch.device("cpu"))
    with pytest.raises(kvcomp.UnsupportedUseError, match="needs the output projection"):
        generate_compressed(model, BATCH, "critical", 0.4)


@pytest.mark.gpu
def test_layers_on_two_devices_are_compressed_where_they_are():
    devices = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.layers.2": 0}
    devices |= {"model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    model = accelerate.dispatch_model(tiny_llama(), devices, main_device=0)
    for recipe in ("flowmm", "pyramidkv", "kvcomp-global", "ada-kv"):
        expected, _ = generate_compressed(tiny_llama(), BATCH, recipe, 0.4)
        on_device = {name: value.cuda() for name, value in BATCH.items()}
        output, cache = generate_compressed(model, on_device, recipe, 0.4)
        assert torch.equal(output.sequences.cpu(), expected.sequences)
        assert all(layer.keys.device == layer.indices.device for layer in cache.layers)
