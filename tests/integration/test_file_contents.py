"""What a file of a cache must hold, and what is said of one that does not: damaged, of another model, or made up."""

from __future__ import annotations

import gc
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inference import generate, generate_compressed, left_padded
from models import TEXT, text_inputs, tiny_llama, tiny_qwen3
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import kvcomp
from kvcomp.runtime.file_header import digest

BATCH = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (50, 20)])
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


def save(path: Path, recipe: Any = "flowmm", budget: Any = 0.4, model: PreTrainedModel | None = None) -> Any:
    """Save the cache of a padded batch, and return it."""
    model = tiny_llama() if model is None else model  # alive until the cache is saved, so that its weights are known
    _, cache = generate_compressed(model, BATCH, recipe, budget, new=4)
    cache.save(path)
    return cache


def rewrite(path: Path, change: Change) -> None:
    """Change header and tensors of a file."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["kvcomp"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, path, metadata={"kvcomp": json.dumps(header)})


def test_the_header_says_what_the_cache_is_of(tmp_path):
    save(tmp_path / "cache")
    with safe_open(tmp_path / "cache", framework="pt") as file:
        header = json.loads(file.metadata()["kvcomp"])
    assert header["format"] == "kvcomp-cache-2"
    assert header["kvcomp"] == kvcomp.__version__
    assert header["strategy"]["name"] == "flowmm"
    assert {"name", "config", "kv_heads", "head_dim", "dtype", "weights"} == set(header["model"])


def test_what_heads_share_is_written_once(tmp_path):
    model = tiny_llama()
    with kvcomp.compress(model, "flowmm", budget=1.0) as cache:
        generate(model, text_inputs(40), cache, 2)
    cache.save(tmp_path / "cache")
    with safe_open(tmp_path / "cache", framework="pt") as file:
        assert file.get_slice("0.table.indices").get_shape() == [1, 1, 41]
    loaded = kvcomp.load_cache(tmp_path / "cache", model)
    assert torch.equal(loaded.layers[0].indices, cache.layers[0].indices)
    assert loaded.layers[0].table.indices.stride(1) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recipe", ["flowmm", "ada-kv"])
def test_a_model_in_another_dtype_goes_on_with_the_cache(recipe, dtype, tmp_path):
    cache = save(tmp_path / "cache", recipe)
    model = tiny_llama().to(dtype)
    loaded = kvcomp.load_cache(tmp_path / "cache", model)
    for mine, other in zip(loaded.layers, cache.layers, strict=True):
        assert mine.keys.dtype == dtype
        assert torch.equal(mine.keys, other.keys.to(dtype))
        assert torch.equal(mine.indices, other.indices)
    with kvcomp.compress(model, recipe, budget=0.4) as unused, torch.no_grad():
        model(**text_inputs(4), past_key_values=unused)
        output = model(input_ids=torch.tensor([[5], [6]]), past_key_values=loaded)
    assert torch.isfinite(output.logits).all()


@pytest.mark.parametrize("recipe", ["kivi", "mikv", "minicache"])
def test_coded_slots_come_back_bit_for_bit_and_in_no_other_dtype(recipe, tmp_path):
    cache = save(tmp_path / "cache", recipe, 0.8)
    loaded = kvcomp.load_cache(tmp_path / "cache", tiny_llama())
    assert all(map(torch.equal, [layer.keys for layer in loaded.layers], [layer.keys for layer in cache.layers]))
    assert loaded.report().allocated_bytes == cache.report().allocated_bytes
    with pytest.raises(kvcomp.InputError, match=r"few bits must be loaded in the dtype .* of torch\.float32"):
        kvcomp.load_cache(tmp_path / "cache", tiny_llama().to(torch.bfloat16))


def wider_rope() -> PreTrainedModel:
    """Return a Llama of the same sizes whose positions turn more slowly."""
    rope = {"rope_type": "default", "rope_theta": 5e5}
    return LlamaForCausalLM(LlamaConfig(**TEXT, rope_parameters=rope)).eval()


def deeper() -> PreTrainedModel:
    """Return a Llama with one more layer."""
    return LlamaForCausalLM(LlamaConfig(**TEXT | {"num_hidden_layers": 4})).eval()


OTHERS = {
    "head_dim": (tiny_qwen3, "16 numbers per head, and the model has 32"),
    "layers": (deeper, "3 layers, and the model has 4"),
    "configuration": (wider_rope, "the same sizes, and another configuration"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_cache_of_another_model_is_refused(other, tmp_path):
    save(tmp_path / "cache")
    build, message = OTHERS[other]
    with pytest.raises(kvcomp.InputError, match=message):
        kvcomp.load_cache(tmp_path / "cache", build())


def test_layers_that_are_not_compressed_are_named(tmp_path):
    layers = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**TEXT, head_dim=16, **layers)).eval()
    _, cache = generate_compressed(model, text_inputs(30), "flowmm", 0.4, new=2)
    with pytest.raises(kvcomp.UnsupportedUseError, match=r"layers \[0, 2\] are transformers' own \(Dynamic.*Sliding"):
        cache.save(tmp_path / "cache")


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    _, cache = generate_compressed(tiny_llama(), BATCH, "flowmm", 0.4, new=2)
    with pytest.raises(kvcomp.InputError, match=r"where a file can be written.*no-folder"):
        cache.save(tmp_path / "no-folder" / "cache")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def endless_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


def longer_tensor(path: Path) -> None:
    """Claim more numbers than the file holds."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name.endswith("keys"))
    header[name]["shape"][2] = 10**12
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("damage", [cut, endless_header, longer_tensor])
def test_a_damaged_file_is_an_error_of_one_line(damage, tmp_path):
    save(tmp_path / "cache")
    damage(tmp_path / "cache")
    with pytest.raises(kvcomp.InputError, match="a saved cache must be a readable safetensors file"):
        kvcomp.load_cache(tmp_path / "cache", tiny_llama())
    with pytest.raises(kvcomp.InputError, match="a saved cache must be a safetensors file, and this is a folder"):
        kvcomp.load_cache(tmp_path, tiny_llama())


def first(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Return a change of one tensor of the first layer."""
    return lambda _, tensors: tensors.update({f"0.{name}": change(tensors[f"0.{name}"]).contiguous()})


def header_with(**fields: Any) -> Change:
    """Return a change of the header."""
    return lambda header, _: header.update(fields)


def layer_with(**fields: Any) -> Change:
    """Return a change of what the header says of the first layer."""
    return lambda header, _: header["layers"][0].update(fields)


MADE_UP: dict[str, tuple[Change, str]] = {
    "format": (header_with(format="kvcomp-cache-1"), r"of format 'kvcomp-cache-2'.* wrote it; save it again"),
    "field": (header_with(code="rm -rf"), "code: Extra inputs"),
    "number": (layer_with(seen=-1), r"layers\.0\.seen"),
    "huge": (layer_with(seen=10**15), r"layers\.0\.seen"),
    "layer": (lambda header, _: header["layers"].pop(), "2 layers, and the model has 3"),
    "strategy": (lambda header, _: header["strategy"].update(scorer="nothing"), "no scorer named 'nothing'"),
    "observation": (layer_with(carried=[{"use": "spy"}]), "no observation named 'spy'"),
    "rotary": (header_with(rotary=[{"layout": [True, True], "layers": [9]}]), "IndexError"),
    "codes": (layer_with(storage={"is": "Popen"}), "holds slots as they came, and the file describes codes"),
    "missing": (lambda _, tensors: tensors.pop("0.table.counts"), "must have indices, counts, modality and positions"),
    "no keys": (lambda _, tensors: tensors.pop("1.storage.keys"), "must have keys and values of four axes"),
    "heads": (first("storage.keys", lambda keys: keys[:, :1]), "as kvcomp wrote it"),
    "width": (first("storage.keys", lambda keys: keys[..., :8]), r"keys must have shape \(2, 2, 2\d, 16\)"),
    "columns": (first("table.columns", lambda columns: columns + 1000), "columns must lie in 53 columns"),
    "kind": (first("table.indices", lambda indices: indices.float()), r"indices must be torch\.int32, got"),
    "tokens": (first("tokens", lambda tokens: tokens - 3), "all layers must have seen the same tokens"),
    "rows": (first("prompt", lambda prompt: prompt[:1]), r"prompt must have shape \(2,\), got \(1,\)"),
}


@pytest.mark.parametrize("lie", MADE_UP)
def test_what_a_file_makes_up_is_found_out(lie, tmp_path):
    save(tmp_path / "cache")
    change, message = MADE_UP[lie]
    rewrite(tmp_path / "cache", change)
    with pytest.raises(kvcomp.KVCompError, match=message):
        kvcomp.load_cache(tmp_path / "cache", tiny_llama())


def test_codes_of_an_unknown_kind_are_refused(tmp_path):
    save(tmp_path / "cache", "kivi", 0.8)
    rewrite(tmp_path / "cache", layer_with(storage=[{"is": "Popen", "args": ["true"]}, []]))
    with pytest.raises(kvcomp.InputError, match="as kvcomp wrote it"):
        kvcomp.load_cache(tmp_path / "cache", tiny_llama())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_sibling_with_other_weights_is_refused_unless_it_is_meant(tmp_path, dtype):
    cache = save(tmp_path / "cache")
    sibling = tiny_llama(seed=1).to(dtype)
    with pytest.raises(kvcomp.InputError, match=r"of \d+ parameters differ.*same_weights=False"):
        kvcomp.load_cache(tmp_path / "cache", sibling)
    loaded = kvcomp.load_cache(tmp_path / "cache", sibling, same_weights=False)
    assert torch.equal(loaded.layers[0].keys, cache.layers[0].keys.to(dtype))
    same = kvcomp.load_cache(tmp_path / "cache", tiny_llama().to(dtype))
    assert torch.equal(same.layers[0].keys, loaded.layers[0].keys)


def test_one_trained_matrix_makes_another_model(tmp_path):
    save(tmp_path / "cache")
    tuned = tiny_llama()
    tuned.model.layers[1].self_attn.q_proj.weight.data.mul_(1.001)
    with pytest.raises(kvcomp.InputError, match="1 of 29 parameters differ"):
        kvcomp.load_cache(tmp_path / "cache", tuned)


def test_weights_that_are_not_known_are_not_compared(tmp_path):
    cache = generate_compressed(tiny_llama(), BATCH, "flowmm", 0.4, new=4)[1]  # its model is gone
    gc.collect()
    cache.save(tmp_path / "cache")
    assert torch.equal(kvcomp.load_cache(tmp_path / "cache", tiny_llama(seed=1)).layers[0].keys, cache.layers[0].keys)


def test_a_configuration_without_a_text_of_its_own_is_refused():
    with pytest.raises(kvcomp.InputError, match="what JSON can hold"):
        digest({"hidden_size": 8, "kinds": {"text", "image"}})
