"""A cache in a file: one safetensors file, with everything that is not a tensor as JSON in its header."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kvcomp.core.config import strategy
from kvcomp.core.errors import InputError, KVCompError, UnsupportedUseError
from kvcomp.core.interfaces import Observation
from kvcomp.core.registry import registry
from kvcomp.core.strategy import Strategy
from kvcomp.runtime.cache import CompressedCache
from kvcomp.runtime.decoding import QueryLog
from kvcomp.runtime.file_header import (
    Header,
    LayerRecord,
    LogRecord,
    RotaryRecord,
    check_model,
    describe,
    parse_header,
)
from kvcomp.runtime.layer import CompressedCacheLayer
from kvcomp.runtime.rotary import Layout, RotaryColumns
from kvcomp.runtime.slots import SlotTable
from kvcomp.runtime.transcript import Transcript
from kvcomp.version import __version__

TABLE = ("indices", "columns", "counts", "modality", "positions", "mask")
ROTARY = ("cos", "sin")
NUMBERS = ("seen", "trimmed", "seconds", "compressions", "steps")
STORAGE = "storage."
# What a file that was tampered with makes torch and Python say.
DAMAGE = (KVCompError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def save_cache(cache: CompressedCache, path: Path) -> None:
    """Write a cache to a file.

    Raises:
        InputError: the file cannot be written.
        UnsupportedUseError: the cache is empty, waits for `finish()`, or has layers that are not compressed.
    """
    _check_savable(cache)
    layers = list(cache.compressed_layers.values())
    tensors: dict[str, Tensor] = {}
    records = []
    for number, layer in enumerate(layers):
        stored, data = layer.storage.dump()
        own = _tensors(layer) | {STORAGE + name: tensor for name, tensor in stored.items()}
        tensors |= {f"{number}.{name}": tensor.contiguous().clone() for name, tensor in own.items()}
        records.append(_record(layer, data))
    header = Header(
        kvcomp=__version__,
        model=describe(cache.config, layers[0].dtype, cache.weights()),
        strategy=cache.strategy.dump(),
        layers=records,
        rotary=_save_rotary(layers, tensors),
    )
    try:
        save_file(tensors, path, metadata={"kvcomp": header.model_dump_json()})
    except (OSError, SafetensorError) as error:
        raise InputError(f"a cache must be saved where a file can be written: {path}: {error}") from None


def saved_strategy(path: Path) -> Strategy:
    """Return the strategy that a file's cache was compressed by."""
    return strategy(_open(path, tensors=False)[0].strategy)


def fill_cache(cache: CompressedCache, path: Path, model: Any, *, same_weights: bool) -> None:
    """Fill an empty cache from a file, each layer on the device of the model's layer, in the model's dtype.

    Args:
        cache: of the model.
        path: of the file.
        model: whose cache it is to be.
        same_weights: whether it must have made the cache, and not one with the same configuration.

    Raises:
        InputError: the file is not of this cache's model, or damaged.
    """
    header, tensors = _open(path)
    layers = cache.compressed_layers
    here = describe(model.config, model.dtype, cache.weights())
    check_model(header.model, here, len(header.layers), len(layers), path, weights=same_weights)
    dtype = model.dtype if header.model.dtype != str(model.dtype) else None
    if dtype is not None and any(record.storage is not None for record in header.layers):
        raise InputError(
            f"slots in few bits must be loaded in the dtype that they were coded in: {path} is of "
            f"{header.model.dtype}, and the model of {model.dtype}; load the model in that dtype"
        )
    devices = _devices(model)
    try:
        for (number, layer), (place, record) in zip(layers.items(), enumerate(header.layers), strict=True):
            own = _own(tensors, f"{place}.", devices.get(number, model.device))
            _fill(layer, record, own, dtype)
            _check_filled(layer, header)
        _check_alike(list(layers.values()))
        _fill_rotary(list(layers.values()), header.rotary, tensors)
    except KVCompError as error:
        raise InputError(f"a saved cache must be as kvcomp wrote it: {path}: {error}") from None
    except DAMAGE as error:
        raise InputError(
            f"a saved cache must be as kvcomp wrote it: {path}: {type(error).__name__}: {error}"
        ) from error


# --- writing ---


def _check_savable(cache: CompressedCache) -> None:
    others = {
        number: type(layer).__name__
        for number, layer in enumerate(cache.layers)
        if number not in cache.compressed_layers
    }
    if others:
        raise UnsupportedUseError(
            f"only compressed layers can be saved, and layers {sorted(others)} are transformers' own "
            f"({', '.join(sorted(set(others.values())))}): their windows and states are not kvcomp's to write"
        )
    if not cache.used:
        raise UnsupportedUseError("the cache is empty: there is nothing to save")
    if any(layer.pending for layer in cache.compressed_layers.values()):
        raise UnsupportedUseError("the cache has deferred its compression; call cache.finish() before saving it")


def _record(layer: CompressedCacheLayer, data: Any) -> LayerRecord:
    return LayerRecord(
        **{name: getattr(layer, name) for name in NUMBERS},
        carried=[observation.dump() for observation in layer.carried],
        log=LogRecord(**layer.log.dump()[1]),
        storage=data,
    )


def _tensors(layer: CompressedCacheLayer) -> dict[str, Tensor]:
    """Return everything of a layer beside its storage that is a tensor, the tail moved into the table; what all heads
    share once.
    """
    table = layer.all_slots()
    assert table is not None
    found = {"tokens": layer.tokens + layer.tail, "prompt": layer.prompt, "rho": layer.rho}
    found |= {f"log.{name}": entry for name, entry in layer.log.dump()[0].items()}
    found |= {f"table.{name}": _once(getattr(table, name), -2) for name in TABLE}
    if table.columns is table.indices:
        del found["table.columns"]
    found |= {"next_positions": layer.upcoming_positions(), "memory": layer.memory, "granted": layer.granted}
    found["transcript"] = layer.transcript.ids
    found |= {f"carried.{place}": sums for place, sums in enumerate(layer.carried.values())}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _once(entry: Tensor | None, axis: int) -> Tensor | None:
    """Return an entry with one head where all are alike."""
    if entry is None:
        return None
    one = entry.narrow(axis, 0, 1)
    return one if bool((entry == one).all()) else entry


def _save_rotary(layers: list[CompressedCacheLayer], tensors: dict[str, Tensor]) -> list[RotaryRecord]:
    """Add the rotary embeddings to the tensors, once for all layers that share them, and return who they belong to."""
    shared = dict.fromkeys(layer.rotary for layer in layers if layer.rotary is not None)
    for place, columns in enumerate(shared):
        tensors |= {
            f"rotary.{place}.{name}": part.contiguous() for name, part in zip(ROTARY, columns.joined(), strict=True)
        }
    return [
        RotaryRecord(
            layout=tuple(columns.layout),
            layers=[place for place, layer in enumerate(layers) if layer.rotary is columns],
        )
        for columns in shared
    ]


# --- reading ---


def _open(path: Path, tensors: bool = True) -> tuple[Header, dict[str, Tensor]]:
    if path.is_dir():
        raise InputError(f"a saved cache must be a safetensors file, and this is a folder: {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = parse_header((file.metadata() or {}).get("kvcomp"), path)
            return header, {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"a saved cache must be a readable safetensors file: {path}: {error}") from None


def _own(tensors: Mapping[str, Tensor], prefix: str, device: torch.device) -> dict[str, Tensor]:
    """Return the tensors whose names begin so, without that, on a device."""
    return {name.removeprefix(prefix): tensor.to(device) for name, tensor in tensors.items() if name.startswith(prefix)}


def _devices(model: Any) -> dict[int, torch.device]:
    """Return where each layer computes, by its number."""
    modules = [
        module for module in model.get_decoder().modules() if isinstance(getattr(module, "layer_idx", None), int)
    ]
    return {int(module.layer_idx): device for module in modules if (device := _device(module)) is not None}


def _device(module: nn.Module) -> torch.device | None:
    """Return where a module computes: where its weights are, or where accelerate brings them when they are needed."""
    weight = next(module.parameters(), None)
    if weight is None or not weight.is_meta:
        return None if weight is None else weight.device
    # accelerate tells it nowhere else.
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((device for device in devices if device is not None), None)
    return None if found is None else torch.device(found)


def _fill(layer: CompressedCacheLayer, record: LayerRecord, own: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    stored = {name.removeprefix(STORAGE): tensor for name, tensor in own.items() if name.startswith(STORAGE)}
    log = {name.removeprefix("log."): entry for name, entry in own.items() if name.startswith("log.")}
    if dtype is not None:
        stored = {name: _cast(tensor, dtype) for name, tensor in stored.items()}
        log = {name: _cast(entry, dtype) if name in ("vectors", "decoded") else entry for name, entry in log.items()}
    if record.storage is None:
        _check_plain(stored)
    layer.storage.load(stored, record.storage)
    layer.lazy_initialization(*layer.storage.read())
    layer.table = _table(own, layer.form.kv_heads)
    layer.tokens, layer.prompt = own["tokens"].cpu(), own["prompt"].cpu()
    layer.log = QueryLog.load(log, record.log.model_dump())
    layer.granted = own["granted"].cpu() if "granted" in own else None
    layer.transcript = Transcript((own["transcript"],)) if "transcript" in own else Transcript()
    layer.next_positions, layer.rho, layer.memory = (own.get(name) for name in ("next_positions", "rho", "memory"))
    for name in NUMBERS:
        setattr(layer, name, getattr(record, name))
    layer.carried = {_observation(spec): own[f"carried.{place}"] for place, spec in enumerate(record.carried)}
    mask = own.get("table.mask")
    layer.holds_padding = mask is not None
    if record.storage is None and layer.trimmed and mask is not None:
        assert layer.table is not None
        layer.keep_slots(layer.table.valid)  # the file holds heads padded to the longest


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers in another dtype, those beyond its range as its largest."""
    limits = torch.finfo(dtype)
    return tensor.float().clamp(limits.min, limits.max).to(dtype)


def _table(own: Mapping[str, Tensor], kv_heads: int) -> SlotTable:
    def entry(name: str) -> Tensor | None:
        found = own.get(f"table.{name}")
        if found is None:
            return None
        return found.expand(*found.shape[:-2], kv_heads, -1)

    indices, columns = entry("indices"), entry("columns")
    counts, modality, positions = entry("counts"), entry("modality"), entry("positions")
    if indices is None or counts is None or modality is None or positions is None:
        raise InputError("the table of slots must have indices, counts, modality and positions")
    return SlotTable(indices, indices if columns is None else columns, counts, modality, positions, entry("mask"))


def _fill_rotary(layers: list[CompressedCacheLayer], shared: list[RotaryRecord], tensors: Mapping[str, Tensor]) -> None:
    for place, owner in enumerate(shared):
        members = [layers[number] for number in owner.layers]
        for device in dict.fromkeys(layer.device for layer in members):
            cos, sin = (tensors[f"rotary.{place}.{name}"].to(device) for name in ROTARY)
            columns = RotaryColumns(((cos, sin),), Layout(*owner.layout))
            for layer in members:
                layer.rotary = columns if layer.device == device else layer.rotary


def _observation(spec: dict[str, Any]) -> Observation:
    fields = {name: value for name, value in spec.items() if name != "use"}
    observation: Observation = registry.find("observation", spec["use"]).value(**fields)
    return observation


# --- what must fit together ---


def _check_plain(stored: Mapping[str, Tensor]) -> None:
    if set(stored) != {"keys", "values"} or any(tensor.dim() != 4 for tensor in stored.values()):
        shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        raise InputError(f"a layer must have keys and values of four axes, got {shapes}")


def _check_filled(layer: CompressedCacheLayer, header: Header) -> None:
    """Raise where the tensors of a layer do not go together, or point beyond what was seen."""
    table, (keys, values) = layer.whole_table(), layer.storage.read()
    batch, slots = len(layer.tokens), table.slots
    heads = (batch, header.model.kv_heads, slots)
    faults = [
        f"{name} must have shape {shape}, got {tuple(tensor.shape)}"
        for name, tensor, shape in (
            ("keys", keys, (*heads, header.model.head_dim)),
            ("values", values, (*heads, values.shape[-1])),
            ("indices", table.indices, heads),
            ("columns", table.columns, heads),
            ("counts", table.counts, heads),
            ("modality", table.modality, heads),
            ("positions", table.positions, (len(table.positions), *heads)),
            ("mask", table.valid, heads),
            ("prompt", layer.prompt, (batch,)),
        )
        if tuple(tensor.shape) != shape
    ]
    faults += [
        f"{name} must be {dtype}, got {tensor.dtype}"
        for name, tensor, dtype in (
            ("indices", table.indices, torch.int32),
            ("columns", table.columns, torch.int32),
            ("mask", table.valid, torch.bool),
            ("tokens", layer.tokens, torch.int64),
        )
        if tensor.dtype != dtype
    ]
    granted, ids = layer.granted, layer.transcript.ids
    if granted is not None and tuple(granted.shape) != heads[:2]:
        faults.append(f"granted must have shape {heads[:2]}, got {tuple(granted.shape)}")
    if ids is not None and not (
        ids.dtype == torch.int32 and ids.shape[:-1] == (batch,) and ids.shape[-1] <= layer.seen
    ):
        faults.append(f"transcript must be int32 ids of {batch} rows and {layer.seen} columns, got {tuple(ids.shape)}")
    for name, places in (("columns", table.columns), ("indices", table.indices), ("tokens", layer.tokens)):
        beyond = layer.seen if name == "tokens" else layer.seen - 1
        if places.numel() and (int(places.max()) > beyond or int(places.min()) < -1):
            faults.append(f"{name} must lie in {layer.seen} columns")
    if faults:
        raise InputError(f"layer {layer.number}: {'; '.join(faults)}")


def _check_alike(layers: list[CompressedCacheLayer]) -> None:
    """Raise where layers have seen different tokens."""
    first = layers[0]
    for layer in layers[1:]:
        if layer.seen != first.seen or not torch.equal(layer.tokens, first.tokens):
            raise InputError(f"all layers must have seen the same tokens, and layer {layer.number} has not")
