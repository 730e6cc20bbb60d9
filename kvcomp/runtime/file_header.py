"""What the header of a saved cache says, and what of it must fit the model and the tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvcomp.core.errors import InputError
from kvcomp.runtime.weights import Sample, differing

FORMAT: Literal["kvcomp-cache-2"] = "kvcomp-cache-2"
MOST_COLUMNS = 2**31 - 1  # columns are int32
# What a model is called, stored and run as, and what transformers writes about itself: no part of what it computes.
INCIDENTAL = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")


class Record(BaseModel):
    """A frozen part of the header, without fields of other versions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelRecord(Record):
    """The model that a cache belongs to.

    Attributes:
        name: where it came from, for messages only.
        config: digest of its configuration.
        kv_heads, head_dim: of its keys.
        dtype: of the slots.
        weights: a sample of them, as `sample_weights` gives it; empty where it is not known.
    """

    name: str
    config: str
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    dtype: str
    weights: list[float | None] = Field(default_factory=list)


class LogRecord(Record):
    """Numbers of a `QueryLog`."""

    end: int = Field(ge=0, le=MOST_COLUMNS)
    scaling: float
    softcap: float | None


class LayerRecord(Record):
    """Numbers of one layer."""

    seen: int = Field(ge=1, le=MOST_COLUMNS)
    trimmed: bool
    seconds: float = Field(ge=0)
    compressions: int = Field(ge=0)
    steps: int = Field(ge=0)
    carried: list[dict[str, Any]]
    log: LogRecord
    storage: Any


class RotaryRecord(Record):
    """Which layers share rotary embeddings."""

    layout: tuple[bool, bool] = Field(strict=False)
    layers: list[int]


class Header(Record):
    """Everything of a saved cache that is not a tensor."""

    format: Literal["kvcomp-cache-2"] = FORMAT
    kvcomp: str
    model: ModelRecord
    strategy: dict[str, Any]
    layers: list[LayerRecord] = Field(min_length=1)
    rotary: list[RotaryRecord]


def parse_header(text: str | None, path: Any) -> Header:
    """Return the header of a file.

    Raises:
        InputError: it is of another version, or damaged.
    """
    try:
        data = json.loads(text or "{}")
    except ValueError:
        data = None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        written = data.get("kvcomp") if isinstance(data, dict) else None
        by = f"; kvcomp {written} wrote it" if written else ""
        raise InputError(f"a saved cache must be of format {FORMAT!r}, and {path} is not{by}; save it again")
    try:
        return Header.model_validate(data)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:5])
        raise InputError(f"the header of a saved cache must be as kvcomp wrote it: {path}: {faults}") from None


def describe(config: Any, dtype: torch.dtype, weights: Sample) -> ModelRecord:
    """Return what a cache must fit of a model, given its configuration, the dtype of its slots and a sample of its
    weights.
    """
    text = config.get_text_config(decoder=True)
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelRecord(
        name=str(config.name_or_path),
        config=digest(config.to_diff_dict()),
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=str(dtype),
        weights=weights,
    )


def digest(config: Mapping[str, Any]) -> str:
    """Return a digest of a configuration, the same wherever the model was loaded from and in whatever dtype.

    >>> digest({"hidden_size": 8, "dtype": "float32"}) == digest({"hidden_size": 8, "dtype": "bfloat16"})
    True

    Raises:
        InputError: it holds what has no text that is the same in every process.
    """
    try:
        text = json.dumps(_essential(config), sort_keys=True)
    except TypeError as error:
        raise InputError(
            f"a model's configuration must hold what JSON can hold for its cache to be saved or loaded: {error}"
        ) from None
    return hashlib.sha256(text.encode()).hexdigest()


def _essential(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {str(name): _essential(item) for name, item in value.items() if name not in INCIDENTAL}
        return {name: item for name, item in kept.items() if not name.startswith("_attn_implementation")}
    return [_essential(item) for item in value] if isinstance(value, list | tuple) else value


def check_model(saved: ModelRecord, here: ModelRecord, layers: int, held: int, path: Any, *, weights: bool) -> None:
    """Raise where a cache is of another model.

    Args:
        saved: what the header says.
        here: what it would say of the model.
        layers: of the cache in the file.
        held: layers of a cache of the model.
        path: of the file.
        weights: whether they must be the same too.

    Raises:
        InputError: everything that differs.
    """
    faults = [f"{layers} layers, and the model has {held}"] if layers != held else []
    for field, meaning in (("kv_heads", "KV heads"), ("head_dim", "numbers per head")):
        if getattr(saved, field) != getattr(here, field):
            faults.append(f"{getattr(saved, field)} {meaning}, and the model has {getattr(here, field)}")
    if not faults and saved.config != here.config:
        faults.append("the same sizes, and another configuration")
    if faults:
        raise InputError(
            f"a saved cache must be loaded with the model that made it, and {path} is of another one "
            f"({saved.name or 'without a name'}): {'; '.join(faults)}"
        )
    if weights and (changed := differing(saved.weights, here.weights, rounded=saved.dtype != here.dtype)):
        raise InputError(
            f"a saved cache must be loaded with the weights that made it, and {path} was made by others: {changed} of "
            f"{len(here.weights)} parameters differ. Load those, or call load_cache(path, model, same_weights=False) "
            "if the keys and values are meant for this model"
        )
