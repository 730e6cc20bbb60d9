"""MobileVLM V2: its projector and its converter, against the layout and the equations of the original."""

import json

import pytest
import torch
from kvcomp_adapters.mobilevlm import MobileVLMConfig, convert, register
from kvcomp_adapters.mobilevlm.modeling import DownsampleProjector
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForImageTextToText, CLIPVisionConfig

import kvcomp
from kvcomp.core.errors import InputError, UnsupportedUseError

VOCABULARY, HIDDEN, WIDE, LAYERS, SEEN = 40, 16, 24, 2, 8
PATCH, SIDE = 2, 26  # 13 by 13 patches, which are pooled into the original's 12 by 12
TOKENS = 144
VISION = {
    "hidden_size": SEEN,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
SETTINGS = {
    "model_type": "mobilevlm",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "mm_projector_type": "ldpnetv2",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
}


def original_shapes():
    """Every name of the authors' layout with its shape, written down by hand."""
    shapes = {
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "model.mm_projector.mlp.mlp.0.weight": (HIDDEN, SEEN),
        "model.mm_projector.mlp.mlp.0.bias": (HIDDEN,),
        "model.mm_projector.mlp.mlp.2.weight": (HIDDEN, HIDDEN),
        "model.mm_projector.mlp.mlp.2.bias": (HIDDEN,),
        "model.mm_projector.peg.peg.0.weight": (HIDDEN, 1, 3, 3),
        "model.mm_projector.peg.peg.0.bias": (HIDDEN,),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{at}self_attn.{name}_proj.weight": (HIDDEN // 2, HIDDEN) for name in "kv"}
        shapes |= {f"{at}mlp.{name}_proj.weight": (WIDE, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (HIDDEN, WIDE)}
        shapes |= {f"{at}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    tower = "model.vision_tower.vision_tower.vision_model."
    shapes |= {
        f"{tower}embeddings.class_embedding": (SEEN,),
        f"{tower}embeddings.patch_embedding.weight": (SEEN, 3, PATCH, PATCH),
        f"{tower}embeddings.position_embedding.weight": ((SIDE // PATCH) ** 2 + 1, SEEN),
    }
    norms = [f"{tower}pre_layrnorm", f"{tower}post_layernorm"]
    for layer in range(VISION["num_hidden_layers"]):
        at = f"{tower}encoder.layers.{layer}."
        norms += [f"{at}layer_norm1", f"{at}layer_norm2"]
        for name in ("q", "k", "v", "out"):
            shapes |= {f"{at}self_attn.{name}_proj.weight": (SEEN, SEEN), f"{at}self_attn.{name}_proj.bias": (SEEN,)}
        shapes |= {f"{at}mlp.fc1.weight": (12, SEEN), f"{at}mlp.fc1.bias": (12,)}
        shapes |= {f"{at}mlp.fc2.weight": (SEEN, 12), f"{at}mlp.fc2.bias": (SEEN,)}
    return shapes | {f"{name}.{part}": (SEEN,) for name in norms for part in ("weight", "bias")}


def original_tensors():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in original_shapes().items()}


def write(folder, tensors, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SETTINGS | settings))
    names = sorted(tensors)
    for shard, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{shard + 1:05}-of-00002.safetensors")
    return folder


def tower():
    return CLIPVisionConfig(**VISION)


def converted(tmp_path, tensors):
    convert(write(tmp_path / "original", tensors), tmp_path / "ours", tower())
    register()
    return AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()


def prompt(config):
    ids = torch.tensor([[1, 5, 6, *[config.image_token_id] * TOKENS, 7, 8, 9]])
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def naive_projector(tensors, features, side):
    """The projector spelt out, one output place at a time."""
    at = "model.mm_projector."
    mixed = functional.gelu(features @ tensors[f"{at}mlp.mlp.0.weight"].T + tensors[f"{at}mlp.mlp.0.bias"])
    mixed = mixed @ tensors[f"{at}mlp.mlp.2.weight"].T + tensors[f"{at}mlp.mlp.2.bias"]
    before = round(features.shape[0] ** 0.5)
    rows = mixed.reshape(before, before, -1)
    spans = [(place * before // side, -(-(place + 1) * before // side)) for place in range(side)]
    grid = torch.stack([torch.stack([rows[a:b, c:d].mean((0, 1)) for c, d in spans]) for a, b in spans])
    kernel, bias = tensors[f"{at}peg.peg.0.weight"][:, 0], tensors[f"{at}peg.peg.0.bias"]
    output = grid + bias
    for row in range(side):
        for column in range(side):
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    if 0 <= row + down < side and 0 <= column + right < side:
                        output[row, column] += kernel[:, down + 1, right + 1] * grid[row + down, column + right]
    return output.flatten(0, 1)


def test_of_two_images_of_24_by_24_patches_144_tokens_each_remain():
    config = MobileVLMConfig(
        vision_config={"model_type": "clip_vision_model", **VISION}, text_config={"hidden_size": 32}
    )
    projector = DownsampleProjector(config)
    assert projector(torch.randn(2, 576, SEEN)).shape == (2, 144, 32)
    assert config.image_seq_length == 144
    assert projector.position.weight.shape == (32, 1, 3, 3)
    with pytest.raises(UnsupportedUseError, match="patches=577"):
        projector(torch.randn(2, 577, SEEN))


def test_the_projector_of_a_converted_model_is_the_original(tmp_path):
    tensors = original_tensors()
    projector = converted(tmp_path, tensors).model.multi_modal_projector
    features = torch.randn(1, 169, SEEN, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(projector(features)[0], naive_projector(tensors, features[0], 12))


def test_every_tensor_of_the_original_reaches_the_converted_model(tmp_path):
    tensors = original_tensors()
    model = converted(tmp_path, tensors)
    held = list(model.state_dict().values())
    assert len(held) == len(tensors)
    for name, tensor in tensors.items():
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensor = torch.cat([tensor, torch.zeros(1, HIDDEN)])
        assert sum(torch.equal(tensor, other) for other in held) >= 1, name


def test_each_kind_of_tensor_goes_to_its_own_place(tmp_path):
    tensors = original_tensors()
    model = converted(tmp_path, tensors)
    text, vision = model.model.language_model, model.model.vision_tower
    for name, tensor in tensors.items():
        language = name.startswith("model.") and "vision_tower" not in name and "mm_projector" not in name
        if language and "embed_tokens" not in name:
            assert torch.equal(text.get_parameter(name.removeprefix("model.")), tensor), name
    tower_at = "model.vision_tower.vision_tower.vision_model."
    held = {name.removeprefix("vision_model."): weight for name, weight in vision.state_dict().items()}
    assert {tower_at + name for name in held} == {name for name in tensors if name.startswith(tower_at)}
    assert all(torch.equal(weight, tensors[tower_at + name]) for name, weight in held.items())


def test_a_converted_model_generates_with_a_compressed_cache_and_never_the_image_token(tmp_path):
    model = converted(tmp_path, original_tensors())
    inputs = prompt(model.config)
    assert model.config.image_token_id == VOCABULARY
    assert model.generation_config.suppress_tokens == [VOCABULARY]
    stock = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with kvcomp.compress(model, "flowmm", budget=1.0) as cache:
        assert model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False).equal(stock)
    with kvcomp.compress(model, "flowmm", budget=0.3) as cache:
        model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False)
        kept = [slots for layer in cache.report().layers for slots in layer.slots]
    assert kept
    assert max(kept) < inputs["input_ids"].shape[1] / 2


def test_missing_unknown_and_misshapen_tensors_are_all_named(tmp_path):
    tensors = original_tensors()
    del tensors["model.mm_projector.peg.peg.0.bias"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.mm_projector.extra.weight"] = torch.zeros(1)
    tensors["model.embed_tokens.weight"] = torch.zeros(VOCABULARY - 1, HIDDEN)
    with pytest.raises(InputError) as refused:
        convert(write(tmp_path / "original", tensors), tmp_path / "ours", tower())
    assert sorted(str(refused.value).splitlines()[1:]) == [
        "  model.embed_tokens.weight: must have shape (40, 16), got (39, 16)",
        "  model.layers.1.mlp.up_proj.weight: missing",
        "  model.mm_projector.extra.weight: unknown",
        "  model.mm_projector.peg.peg.0.bias: missing",
    ]
    assert not (tmp_path / "ours").exists()


def test_constants_that_old_versions_saved_are_no_fault(tmp_path):
    tensors = original_tensors()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    tensors["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(170)[None]
    convert(write(tmp_path / "original", tensors), tmp_path / "ours", tower())
    assert (tmp_path / "ours" / "config.json").exists()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mm_projector_type": "ldpnet"}, "must be ldpnetv2, .* got 'ldpnet'"),
        ({"mm_vision_select_feature": "cls_patch"}, "must be patch, got 'cls_patch'"),
    ],
)
def test_other_models_are_refused(tmp_path, settings, named):
    with pytest.raises(InputError, match=named):
        convert(write(tmp_path / "original", {"x": torch.zeros(1)}, **settings), tmp_path / "ours")


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(InputError, match="holds none"):
        convert(tmp_path, tmp_path / "ours")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(InputError, match=r"pickled \(pytorch_model.bin\).*safetensors.torch.save_file"):
        convert(tmp_path, tmp_path / "ours")


def test_broken_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"config.json must be the configuration"):
        convert(tmp_path, tmp_path / "ours")
    folder = write(tmp_path / "original", {"x": torch.zeros(1)})
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"model-00001-of-00002.safetensors must be a safetensors file"):
        convert(folder, tmp_path / "ours")
