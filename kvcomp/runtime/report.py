"""What a cache holds, in numbers read from its storages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvcomp.core.strategy import Strategy
from kvcomp.runtime.layer import CompressedCacheLayer


@dataclass(frozen=True)
class LayerReport:
    """One layer. Tuples have one entry per row of the batch; slots, merged and evicted are means over KV heads.

    Attributes:
        layer: number of the layer in the model.
        slots: filled slots.
        tokens: tokens seen, padding not counted; slots + merged + evicted.
        merged: tokens that live on in another token's slot.
        evicted: tokens that are gone.
        rho: share of attention that crosses modalities, None where not measured or only one modality is there.
        allocated_bytes: keys and values in filled slots.
        full_bytes: what a cache that keeps every token would take.
    """

    layer: int
    slots: tuple[float, ...]
    tokens: tuple[int, ...]
    merged: tuple[float, ...]
    evicted: tuple[float, ...]
    rho: tuple[float | None, ...]
    allocated_bytes: int
    full_bytes: int


@dataclass(frozen=True)
class Report:
    """A cache. `allocated_bytes + reserved_bytes + bookkeeping_bytes` is what its storages hold.

    Attributes:
        recipe: name of the strategy.
        budget: as the strategy was given it.
        turns: `recompress` or `append`.
        trigger: when tokens are compressed while they are decoded.
        layers: the compressed layers.
        untouched: numbers of the layers that are not full attention and were left alone.
        allocated_bytes: keys and values in filled slots.
        reserved_bytes: room for keys and values beyond that, and the padding of shorter heads and rows.
        bookkeeping_bytes: indices, counts, modalities, positions, masks, and sums carried to later turns.
        full_bytes: what a cache that keeps every token would take.
        seconds: time spent compressing.
    """

    recipe: str
    budget: str
    turns: str
    trigger: str
    layers: tuple[LayerReport, ...]
    untouched: tuple[int, ...]
    allocated_bytes: int
    reserved_bytes: int
    bookkeeping_bytes: int
    full_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        console = Console(width=100, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self.__rich__())
        return capture.get().rstrip()

    def __rich__(self) -> Table:
        share = self.allocated_bytes / self.full_bytes if self.full_bytes else 1.0
        sizes = f"{_size(self.allocated_bytes)} of {_size(self.full_bytes)} ({share:.1%})"
        title = f"{self.recipe} at budget {self.budget}: {sizes}"
        caption = (
            f"reserved {_size(self.reserved_bytes)}, bookkeeping {_size(self.bookkeeping_bytes)}, "
            f"compressed in {self.seconds * 1e3:.1f} ms"
        )
        table = Table(title=title, caption=caption, min_width=max(len(title), len(caption)))  # a line each
        for column in ("layer", "slots", "tokens", "merged", "evicted", "rho", "bytes"):
            table.add_column(column, justify="right")
        for layer in self.layers:
            rows = (layer.slots, layer.tokens, layer.merged, layer.evicted, layer.rho)
            table.add_row(str(layer.layer), *(_join(values) for values in rows), _size(layer.allocated_bytes))
        return table


def report_layers(strategy: Strategy, compressed: Mapping[int, CompressedCacheLayer], num_layers: int) -> Report:
    """Return what the compressed layers of a cache hold.

    Args:
        strategy: of the cache.
        compressed: the layers by their number in the model.
        num_layers: of the cache, those that are left alone included.
    """
    layers = tuple(report_layer(number, layer) for number, layer in compressed.items())
    held = sum(layer.storage.nbytes() for layer in compressed.values())
    allocated = sum(layer.allocated_bytes for layer in layers)
    return Report(
        recipe=strategy.name,
        budget="1" if strategy.ignores_budget else str(strategy.budget),
        turns=strategy.turns,
        trigger=str(strategy.trigger),
        layers=layers,
        untouched=tuple(number for number in range(num_layers) if number not in compressed),
        allocated_bytes=allocated,
        reserved_bytes=held - allocated,
        bookkeeping_bytes=storage_bytes(tensor for layer in compressed.values() for tensor in layer.bookkeeping()),
        full_bytes=sum(layer.full_bytes for layer in layers),
        seconds=sum(layer.seconds for layer in compressed.values()),
    )


def report_layer(number: int, layer: CompressedCacheLayer) -> LayerReport:
    """Return the numbers of one layer; everything about merging follows from the counts of its slots."""
    table = layer.all_slots()
    if table is None:
        return LayerReport(number, (), (), (), (), (), 0, 0)
    tokens = layer.tokens + layer.tail
    slots = table.valid.sum(dim=-1).double().mean(dim=-1).cpu()
    kept_or_merged = table.counts.double().sum(dim=-1).mean(dim=-1).cpu().minimum(tokens)  # counts are rounded sums
    return LayerReport(
        layer=number,
        slots=_floats(slots),
        tokens=tuple(tokens.tolist()),
        merged=_floats(kept_or_merged - slots),
        evicted=_floats(tokens - kept_or_merged),
        rho=_rho(layer.rho, len(tokens)),
        allocated_bytes=layer.storage.filled_nbytes(int(table.valid.sum()), layer.form.slot_bytes),
        full_bytes=int(tokens.sum()) * layer.form.kv_heads * layer.form.slot_bytes,
    )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages behind these tensors."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _rho(rho: Tensor | None, batch: int) -> tuple[float | None, ...]:
    if rho is None:
        return (None,) * batch
    return tuple(None if math.isnan(value) else value for value in rho.tolist())


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 6) for value in values.tolist())


def _join(values: Iterable[float | None]) -> str:
    return " ".join("-" if value is None else f"{value:.4g}" for value in values)


def _size(num_bytes: float) -> str:
    unit = "B"
    for larger in ("KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            break
        num_bytes, unit = num_bytes / 1024, larger
    return f"{f'{num_bytes:.1f}'.removesuffix('.0')} {unit}"
