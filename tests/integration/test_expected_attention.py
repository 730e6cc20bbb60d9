"""Expected attention on models: its rotations to come are those that the model itself would make."""

from __future__ import annotations

import oracles
import oracles_expected
import oracles_recon
import pytest
import torch
from inference import generate, left_padded
from kvcomp_strategies.scorers.expected_attention import expected_rotation
from models import image_inputs, text_inputs, tiny_cohere, tiny_glm, tiny_llama, tiny_phi3, tiny_qwen_vl
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import kvcomp
from kvcomp import LayerView

POSITIONS = 40
TOLERANCE = 0.01  # of a mean of cos or sin over the next 512 positions
MODELS = {
    "llama": (tiny_llama, text_inputs(37)),
    "phi-3, partial": (tiny_phi3, text_inputs(37)),
    "qwen2.5-vl, three axes": (tiny_qwen_vl, image_inputs(images=2, between=4)),
}


def own_rotations(model: PreTrainedModel, first: int, count: int) -> list[Tensor]:
    """The model's rotation of each of `count` positions of a text, `(head_dim, head_dim)` float64."""
    decoder = model.get_decoder()
    head_dim = decoder.layers[0].self_attn.head_dim
    axes = 3 if "mrope_section" in str(decoder.config.rope_parameters) else None
    places = torch.arange(first, first + count)[None]
    places = places if axes is None else places.expand(axes, 1, -1)
    cos, sin = (values.reshape(-1, count, values.shape[-1])[0] for values in decoder.rotary_emb(torch.ones(1), places))
    pairs = cos.shape[-1] // 2
    angles = torch.atan2(sin, cos)[:, :pairs]  # of a text token all axes have the same
    return [oracles_expected.rotation(row.tolist(), head_dim) for row in angles]


def queries_before_rotation(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[list[Tensor], DynamicCache]:
    """What each layer projects its queries to, `(heads, tokens, head_dim)`, and the stock cache."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: object, output: Tensor) -> None:
        found.append(output[0, :, : model.get_decoder().config.num_attention_heads * head_dim])

    layers = model.get_decoder().layers
    head_dim = layers[0].self_attn.head_dim
    projections = [getattr(layer.self_attn, "q_proj", None) or layer.self_attn.qkv_proj for layer in layers]
    handles = [projection.register_forward_hook(note) for projection in projections]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    for handle in handles:
        handle.remove()
    return [found_by.unflatten(-1, (-1, head_dim)).transpose(0, 1) for found_by in found], cache


@pytest.mark.parametrize("family", MODELS)
def test_what_is_kept_is_what_the_models_own_rotations_give(family):
    build, inputs = MODELS[family]
    model = build()
    scorer = {"use": "expected-attention", "positions": POSITIONS}
    with kvcomp.compress(model, "expected-attention", budget=0.4, scorer=scorer) as cache:
        generate(model, inputs, cache, 1)
    queries, stock = queries_before_rotation(model, inputs)
    table = cache.layers[0].upcoming_positions()
    tokens = stock.layers[0].keys.shape[2]
    turn = sum(own_rotations(model, tokens if table is None else int(table[0, 0]), POSITIONS)) / POSITIONS
    slots = oracles.num_slots("0.4", tokens)
    for layer, mine in enumerate(cache.layers):
        keys, values = stock.layers[layer].keys[0], stock.layers[layer].values[0]
        group = queries[layer].shape[0] // keys.shape[0]
        scaling = model.get_decoder().layers[layer].self_attn.scaling
        for head in range(keys.shape[0]):
            members = list(queries[layer][head * group : (head + 1) * group])
            scores = oracles_expected.expected_scores(members, keys[head], values[head], turn, scaling)
            assert mine.indices[0, head].tolist() == oracles_recon.kept(scores, slots, sinks=4)


class Views:
    """Remembers what layers looked like when they were compressed."""

    def __init__(self) -> None:
        self.seen: list[LayerView] = []

    def compressed(self, view: LayerView, plan: object) -> None:
        self.seen.append(view)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [100, 400, 1500])
@pytest.mark.parametrize("family", [tiny_llama, tiny_phi3, tiny_glm, tiny_cohere, tiny_qwen_vl])
def test_rotations_to_come_are_not_those_of_a_rounded_step(family, tokens, dtype):
    """Cos and sin come in the model's dtype, and 512 steps would make their rounding 512 times as large."""
    model, views = family(), Views()
    inputs = text_inputs(tokens) if family is not tiny_qwen_vl else image_inputs(images=tokens // 20, between=16)
    count = inputs["input_ids"].shape[1]
    with kvcomp.compress(model.to(dtype), "expected-attention", budget=0.4, watcher=views) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
    upcoming = cache.layers[0].upcoming_positions()
    decoder = model.get_decoder()
    places = (count if upcoming is None else int(upcoming[0, 0])) + torch.arange(512)[None]
    places = places.expand(3, 1, -1) if family is tiny_qwen_vl else places
    cos, sin = (part.reshape(-1, 512, part.shape[-1])[0] for part in decoder.rotary_emb(torch.ones(1), places))
    mean = expected_rotation(views.seen[0], 512)
    width = slice(0, None, 2) if family is tiny_cohere else slice(cos.shape[-1] // 2)
    for found, truth in ((mean.cos, cos), (mean.sin, sin)):
        torch.testing.assert_close(found[0, 0, 0], truth.mean(dim=0)[width], rtol=0, atol=TOLERANCE)


def rotations(model: PreTrainedModel, rows: dict[str, Tensor]) -> Tensor:
    """Return the mean rotations to come of each row, `(cos and sin, batch, pairs)`."""
    views = Views()
    with kvcomp.compress(model, "expected-attention", budget=0.4, watcher=views) as cache:
        generate(model, rows, cache, 1)
    mean = expected_rotation(views.seen[0], 512)
    return torch.stack([mean.cos[:, 0, 0], mean.sin[:, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rotations_to_come_are_not_read_from_padding(dtype):
    model, lengths = tiny_llama().to(dtype), (90, 31, 5)
    prompts = [text_inputs(tokens, seed=tokens)["input_ids"] for tokens in lengths]
    together = rotations(model, left_padded(prompts))
    for row, prompt in enumerate(prompts):
        alone = rotations(model, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)})
        torch.testing.assert_close(together[:, row], alone[:, 0], rtol=0, atol=1e-5)


def test_compressing_while_tokens_are_decoded_is_refused():
    with pytest.raises(kvcomp.ConfigError, match="'expected-attention' cannot compress again while tokens are decoded"):
        kvcomp.strategy("expected-attention", trigger="over-budget")
