"""A cache in a file: one safetensors file, with everything that is not a tensor as JSON in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvcomp.core.config import strategy
from kvcomp.core.errors import InputError, UnsupportedUseError
from kvcomp.core.interfaces import Observation
from kvcomp.core.registry import registry
from kvcomp.runtime.cache import CompressedCache
from kvcomp.runtime.decoding import QueryLog
from kvcomp.runtime.layer import CompressedCacheLayer
from kvcomp.runtime.rotary import Layout, RotaryColumns
from kvcomp.runtime.slots import SlotTable
from kvcomp.version import __version__

FORMAT = "kvcomp-cache-1"
TABLE = ("indices", "columns", "counts", "modality", "positions", "mask")
ROTARY = ("cos", "sin")
NUMBERS = ("seen", "trimmed", "seconds", "compressions", "steps")


def save_cache(cache: CompressedCache, path: Path) -> None:
    """Write a cache to a file.

    Raises:
        UnsupportedUseError: the cache is empty, waits for `finish()`, or has layers that are not compressed.
    """
    if len(cache.compressed_layers) != len(cache.layers):
        raise UnsupportedUseError("a cache with sliding or linear layers cannot be saved: their state is not kvcomp's")
    if not cache.used:
        raise UnsupportedUseError("the cache is empty: there is nothing to save")
    if any(layer.pending for layer in cache.compressed_layers.values()):
        raise UnsupportedUseError("the cache has deferred its compression; call cache.finish() before saving it")
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    for number, layer in cache.compressed_layers.items():
        stored, data = layer.storage.dump()
        own = _tensors(layer) | stored
        tensors |= {f"{number}.{name}": tensor.contiguous().clone() for name, tensor in own.items()}
        carried = [observation.dump() for observation in layer.carried]
        layers.append(
            {name: getattr(layer, name) for name in NUMBERS}
            | {"carried": carried, "log": layer.log.dump()[1], "storage": data}
        )
    header = {"format": FORMAT, "kvcomp": __version__, "strategy": cache.strategy.dump(), "layers": layers}
    header["rotary"] = _save_rotary(list(cache.compressed_layers.values()), tensors)
    header["shape"] = _shape(next(iter(cache.compressed_layers.values())))
    save_file(tensors, path, metadata={"kvcomp": json.dumps(header)})


def fill_cache(cache: CompressedCache, path: Path, model: Any) -> None:
    """Fill an empty cache from a file, on the model's device.

    Raises:
        InputError: the file is not of this cache's model.
    """
    header, tensors = _read(path, model.device)
    if len(header["layers"]) != len(cache.compressed_layers):
        raise InputError(
            f"{path} holds a cache of {len(header['layers'])} layers, and the model has {len(cache.compressed_layers)}"
        )
    expected = expected_shape(model)
    if header["shape"] != expected:
        raise InputError(f"{path} holds a cache of another model: {header['shape']}, and this model has {expected}")
    for (number, layer), numbers in zip(cache.compressed_layers.items(), header["layers"], strict=True):
        prefix = f"{number}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        _fill(layer, numbers, own)
    _fill_rotary(list(cache.compressed_layers.values()), header["rotary"], tensors)


def saved_strategy(path: Path) -> Any:
    """Return the strategy that a file's cache was compressed by."""
    return strategy(_read(path, torch.device("cpu"), tensors=False)[0]["strategy"])


def _shape(layer: CompressedCacheLayer) -> dict[str, Any]:
    return {"kv_heads": layer.form.kv_heads, "head_dim": layer.form.key_dim, "dtype": str(layer.dtype)}


def expected_shape(model: Any) -> dict[str, Any]:
    """Return what the keys of a model look like."""
    text = model.config.get_text_config(decoder=True)
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {"kv_heads": kv_heads, "head_dim": head_dim, "dtype": str(model.dtype)}


def _tensors(layer: CompressedCacheLayer) -> dict[str, Tensor]:
    """Return everything of a layer beside its storage that is a tensor, the tail moved into the table."""
    table = layer.all_slots()
    assert table is not None
    found = {"tokens": layer.tokens + layer.tail, "prompt": layer.prompt, "rho": layer.rho}
    found |= {f"log.{name}": entry for name, entry in layer.log.dump()[0].items()}
    found |= {f"table.{name}": getattr(table, name) for name in TABLE}
    if table.columns is table.indices:
        del found["table.columns"]
    found |= {"next_positions": layer.upcoming_positions(), "memory": layer.memory}
    found |= {f"carried.{place}": sums for place, sums in enumerate(layer.carried.values())}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _fill(layer: CompressedCacheLayer, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    data = numbers.get("storage")
    layer.storage.load(tensors, data)
    layer.lazy_initialization(*layer.storage.read())
    table = {name: tensors.get(f"table.{name}") for name in TABLE}
    table["columns"] = table["indices"] if table["columns"] is None else table["columns"]
    layer.table = SlotTable(**table)  # type: ignore[arg-type]
    layer.tokens = tensors["tokens"].cpu()
    log = {name.removeprefix("log."): entry for name, entry in tensors.items() if name.startswith("log.")}
    layer.prompt, layer.log = tensors["prompt"].cpu(), QueryLog.load(log, numbers["log"])
    layer.next_positions, layer.rho = tensors.get("next_positions"), tensors.get("rho")
    layer.memory = tensors.get("memory")
    for name in NUMBERS:
        setattr(layer, name, numbers[name])
    layer.carried = {_observation(spec): tensors[f"carried.{place}"] for place, spec in enumerate(numbers["carried"])}
    layer.holds_padding = tensors.get("table.mask") is not None
    if data is None and layer.trimmed and layer.holds_padding:
        layer.keep_slots(tensors["table.mask"])  # the file holds heads padded to the longest


def _save_rotary(layers: list[CompressedCacheLayer], tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Add the rotary embeddings to the tensors, once for all layers that share them, and return who they belong to."""
    shared = dict.fromkeys(layer.rotary for layer in layers if layer.rotary is not None)
    for place, columns in enumerate(shared):
        tensors |= {
            f"rotary.{place}.{name}": part.contiguous() for name, part in zip(ROTARY, columns.joined(), strict=True)
        }
    return [
        {"layout": columns.layout, "layers": [place for place, layer in enumerate(layers) if layer.rotary is columns]}
        for columns in shared
    ]


def _fill_rotary(layers: list[CompressedCacheLayer], shared: list[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
    for place, owner in enumerate(shared):
        cos, sin = (tensors[f"rotary.{place}.{name}"] for name in ROTARY)
        columns = RotaryColumns(((cos, sin),), Layout(*owner["layout"]))
        for layer in owner["layers"]:
            layers[layer].rotary = columns


def _observation(spec: dict[str, Any]) -> Observation:
    fields = {name: value for name, value in spec.items() if name != "use"}
    observation: Observation = registry.find("observation", spec["use"]).value(**fields)
    return observation


def _read(path: Path, device: torch.device, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = json.loads((file.metadata() or {}).get("kvcomp", "{}"))
            if header.get("format") != FORMAT:
                raise InputError(f"{path} is not a cache that this version of kvcomp wrote (format {FORMAT!r})")
            return header, {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"a saved cache must be a readable safetensors file: {path}: {error}") from None
