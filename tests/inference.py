"""Requests to tiny models: what the integration tests have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import kvcomp
from kvcomp.core.registry import registry

RECIPES = [entry.name for entry in registry.entries("recipe")]
STRATEGIES = {name: kvcomp.strategy(name) for name in RECIPES}
FIRM = [name for name, made in STRATEGIES.items() if made.allocator.firm]  # refuse what is below their smallest budget
COMPRESSING = [name for name, made in STRATEGIES.items() if made.selector is not None and name not in FIRM]
SHRINKING = [name for name, made in STRATEGIES.items() if made.selector is None and made.store.shrinks]


def generate(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], cache: Any, new: int = 8, **settings: Any
) -> Any:
    """Return the output of greedy generation, sequences and logits."""
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True} | settings
    return model.generate(**inputs, past_key_values=cache, max_new_tokens=new, **settings)


def generate_stock(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], new: int = 8, **settings: Any) -> Any:
    """Return the same with transformers' own cache."""
    return generate(model, inputs, DynamicCache(config=model.config), new, **settings)


def generate_compressed(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    recipe: Any,
    budget: Any = None,
    new: int = 8,
    **settings: Any,
) -> tuple[Any, kvcomp.CompressedCache]:
    """Return the output and the compressed cache."""
    with kvcomp.compress(model, recipe, budget=budget) as cache:
        output = generate(model, inputs, cache, new, **settings)
    return output, cache


def assert_same_generation(mine: Any, reference: Any) -> None:
    """Two pairs of an output and its cache say the same to rounding, and hold the same slots."""
    (output, cache), (expected, expected_cache) = mine, reference
    assert torch.equal(output.sequences, expected.sequences)
    for logits, others in zip(output.logits, expected.logits, strict=True):
        assert torch.allclose(logits, others, atol=2e-5)
    layers, expected_layers = (each.compressed_layers for each in (cache, expected_cache))
    assert layers.keys() == expected_layers.keys()
    for place, layer in layers.items():
        assert torch.equal(layer.indices, expected_layers[place].indices)
        assert torch.equal(layer.counts, expected_layers[place].counts)


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return rows `(1, tokens)` of different lengths as one batch, padded on the left with token 0."""
    return _padded(rows, lambda width, tokens: slice(width - tokens, width))


def right_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return rows `(1, tokens)` of different lengths as one batch, padded on the right with token 0."""
    return _padded(rows, lambda width, tokens: slice(0, tokens))


def _padded(rows: list[torch.Tensor], place_of: Callable[[int, int], slice]) -> dict[str, torch.Tensor]:
    width = max(row.shape[1] for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        columns = place_of(width, row.shape[1])
        ids[place, columns] = row[0]
        mask[place, columns] = 1
    return {"input_ids": ids, "attention_mask": mask}


def kept(cache: kvcomp.CompressedCache) -> torch.Tensor:
    """Return how many slots each head holds, `(layers, batch, kv_heads)`."""
    return torch.stack([(layer.indices >= 0).sum(dim=-1) for layer in cache.layers])


def quiet_prefill(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], recipe: Any, budget: Any
) -> kvcomp.CompressedCache:
    """Return the cache after one bare forward of the prompt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kvcomp.IgnoredSettingWarning)
        with kvcomp.compress(model, recipe, budget=budget) as cache, torch.no_grad():
            model(**inputs, past_key_values=cache)
    return cache
