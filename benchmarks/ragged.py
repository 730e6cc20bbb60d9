"""One decoded token over heads of different lengths: packed, padded with a mask, and uniform, inside one run.

    python benchmarks/ragged.py [--shortest 50] [--longest 1600] [--repeats 40] [--out benchmark-output/ragged.json]

One layer of 8 KV heads, 4 query heads each, head_dim 128, with lengths spread evenly between the shortest and the
longest; one torch thread. In every repeat each case runs once, in an order that rotates; medians over repeats are
reported. A step is the sum of what a layer does for a token: it is appended, and attended to; the padded case makes its
mask first, which the other two do without. Ratios of steps, and of the attention alone, are to the padded case.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from kvcomp_strategies.stores.buffers import BufferedStorage
from kvcomp_strategies.stores.dense import Dense
from kvcomp_strategies.stores.ragged import Ragged
from torch import Tensor

from kvcomp.core.packed import PackedSlots
from kvcomp.runtime.forward import Logits
from kvcomp.runtime.masks import over_slots
from kvcomp.runtime.packed import attend_packed
from kvcomp.runtime.slots import SlotTable, new_tokens

HEADS, GROUP, HEAD_DIM = 8, 4, 128
PADDED, PACKED, UNIFORM = "padded with a mask", "packed", "uniform, as many slots in all"
BAR = 1.0  # a packed step to a padded one


def lengths_between(shortest: int, longest: int) -> Tensor:
    """Return the slots of each KV head, `(kv_heads,)`."""
    return torch.linspace(shortest, longest, HEADS).long()


def open_stores(lengths: Tensor, dtype: torch.dtype) -> dict[str, BufferedStorage]:
    """Return the same slots in each layout, with room for what is appended."""
    torch.manual_seed(0)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None])[None]
    keys, values = (torch.randn(*mask.shape, HEAD_DIM).to(dtype) for _ in range(2))
    mean = int(lengths.float().mean())
    stores: dict[str, BufferedStorage] = {name: Dense().open() for name in (PADDED, UNIFORM)}
    stores |= {PACKED: Ragged().open()}
    for name, store in stores.items():
        if name == UNIFORM:
            store.replace(keys[:, :, :mean].clone(), values[:, :, :mean].clone())
        else:
            store.replace(keys, values, mask)
        store.append(keys[:, :, :1], values[:, :, :1])
    return stores


def steps(stores: dict[str, BufferedStorage], lengths: Tensor, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Return one attention call per layout."""
    query = torch.randn(1, HEADS * GROUP, 1, HEAD_DIM).to(dtype)
    mask = torch.arange(int(lengths.max()) + 1) < lengths[:, None]
    mask[:, -1] = True
    rows = mask[None, :, None].expand(1, HEADS, GROUP, -1)

    def over(name: str, mask: Tensor | None) -> Tensor:
        keys, values = stores[name].read()
        return F.scaled_dot_product_attention(query.view(1, HEADS, GROUP, HEAD_DIM), keys, values, mask)

    def packed() -> Tensor:
        slots = stores[PACKED].packed()
        assert isinstance(slots, PackedSlots)
        return attend_packed("sdpa", query, slots, [None] * HEADS, Logits(HEAD_DIM**-0.5))[0]

    return {PADDED: lambda: over(PADDED, rows), PACKED: packed, UNIFORM: lambda: over(UNIFORM, None)}


def appends(stores: dict[str, BufferedStorage], dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Return one append of a token per layout."""
    token = torch.randn(1, HEADS, 1, HEAD_DIM).to(dtype)

    def append(store: BufferedStorage) -> None:
        store.append(token, token)

    return {name: lambda store=store: append(store) for name, store in stores.items()}  # type: ignore[misc]


def mask_making(lengths: Tensor) -> Callable[[], Tensor | None]:
    """Return what the padded case does before each attention call: the mask over its slots, from their table."""
    held = (torch.arange(int(lengths.max())) < lengths[:, None])[None]
    entries = torch.arange(held.shape[2], dtype=torch.int32).expand(held.shape).contiguous()
    table = SlotTable(entries, entries, torch.ones(held.shape), entries.to(torch.int8), entries[None], held)
    seen = held.shape[2]

    def make() -> Tensor | None:
        token = new_tokens((1, HEADS, 1), seen, torch.tensor([seen]), device=torch.device("cpu"))
        return over_slots(None, table.extend(token), 1, seen, GROUP)

    return make


def medians(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each case, in an order that rotates."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for repeat in range(repeats + 2):
        for place in range(len(names)):
            name = names[(repeat + place) % len(names)]
            started = time.perf_counter()
            cases[name]()
            if repeat >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(shortest: int, longest: int, dtype: torch.dtype, repeats: int) -> dict[str, object]:
    """Return medians in milliseconds, ratios and bytes of one spread of lengths."""
    lengths = lengths_between(shortest, longest)
    stores = open_stores(lengths, dtype)
    calls = steps(stores, lengths, dtype)
    packed, padded = calls[PACKED]().flatten().float(), calls[PADDED]().flatten().float()
    attention, appended = medians(calls, repeats), medians(appends(stores, dtype), repeats)
    mask = medians({PADDED: mask_making(lengths)}, repeats)
    step = {name: attention[name] + appended[name] + mask.get(name, 0.0) for name in attention}
    return {
        "slots": lengths.tolist(),
        "dtype": str(dtype),
        "attention_ms": milliseconds(attention),
        "append_ms": milliseconds(appended),
        "mask_ms": milliseconds(mask),
        "step_ms": milliseconds(step),
        "packed_to_padded": round(step[PACKED] / step[PADDED], 3),
        "packed_to_padded_attention": round(attention[PACKED] / attention[PADDED], 3),
        "packed_to_uniform": round(step[PACKED] / step[UNIFORM], 3),
        "bytes": {name: store.nbytes() for name, store in stores.items()},
        "largest_difference": float((packed - padded).abs().max()),
    }


def milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    """Return durations in milliseconds, rounded."""
    return {name: round(value * 1e3, 4) for name, value in seconds.items()}


def main() -> None:
    """Measure, print, and write a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shortest", type=int, default=50)
    parser.add_argument("--longest", type=int, default=1600)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmark-output/ragged.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        results = [
            measure(arguments.shortest, arguments.longest, dtype, arguments.repeats)
            for dtype in (torch.float32, torch.bfloat16)
        ]
    for result in results:
        print(json.dumps(result, indent=2))
        ratio = result["packed_to_padded"]
        print(
            f"a packed step to a padded one: {ratio}, at most {BAR}: {'met' if float(str(ratio)) <= BAR else 'MISSED'}"
        )
    document = {"torch": torch.__version__, "machine": platform.machine(), "results": results}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
