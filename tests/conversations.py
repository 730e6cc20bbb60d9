"""Conversations that arrive forward by forward: rows in a batch, padded where they are shorter, or each one alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from models import IMAGE_TOKEN, VISION_END, VISION_START
from torch import Tensor
from transformers import PreTrainedModel

import kvcomp

IMAGE = (VISION_START, *[IMAGE_TOKEN] * 4, VISION_END)  # a picture of 4 x 4 patches
GRID = (1, 4, 4)
PATCH = 3 * 2 * 14 * 14


@dataclass(frozen=True)
class Row:
    """One row's conversation: the ids of each forward, `(tokens,)`, and the pixels of the pictures in it."""

    forwards: tuple[Tensor, ...]
    pixels: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def ids(self) -> Tensor:
        """Return all ids, `(1, tokens)`."""
        return torch.cat(self.forwards)[None]

    def until(self, forward: int) -> dict[str, Tensor]:
        """Return the conversation up to the end of a forward as a processor gives it."""
        ids = torch.cat(self.forwards[: forward + 1])[None]
        shown = [pixels for number, pixels in self.pixels.items() if number <= forward]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if shown:
            inputs |= {**_media(shown), "mm_token_type_ids": (ids == IMAGE_TOKEN).int()}
        return inputs


def row(*parts: int | str, seed: int = 0) -> Row:
    """Return a row with a forward per part: so many random tokens of text, or `"5i3i"` for text with pictures between.

    >>> row(4, "2i3").forwards[1].shape
    torch.Size([11])
    """
    generator = torch.Generator().manual_seed(seed)
    forwards, pixels = [], {}
    for number, part in enumerate(parts):
        ids: list[int] = []
        texts = [int(text or 0) for text in str(part).split("i")]
        for place, text in enumerate(texts):
            ids += [*(IMAGE if place else ()), *torch.randint(2, 80, (text,), generator=generator).tolist()]
        if len(texts) > 1:
            pixels[number] = torch.randn(16 * (len(texts) - 1), PATCH, generator=generator)
        forwards.append(torch.tensor(ids, dtype=torch.long))
    return Row(tuple(forwards), pixels)


def _media(pixels: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what a model is given of these pictures."""
    if not pixels:
        return {}
    patches = torch.cat(list(pixels))
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([GRID] * (len(patches) // 16))}


def positions_of(model: PreTrainedModel, row: Row) -> Tensor:
    """Return the positions of a row in one shot, `(axes, tokens)`: the model's own rule where it sees pictures."""
    if not row.pixels:
        return torch.arange(row.ids.shape[1])[None]
    inputs = row.until(len(row.forwards))
    known = {name: inputs[name] for name in ("input_ids", "image_grid_thw", "mm_token_type_ids")}
    positions: Tensor = model.base_model.get_rope_index(**known)[0]
    return positions[:, 0]


def feed(model: PreTrainedModel, cache: Any, rows: Sequence[Row], forwards: range | None = None) -> list[Tensor]:
    """Feed forwards (all by default) and return the logits after the last token of each, `(batch, vocabulary)`.

    Positions are explicit, and those of each row alone; each forward is padded on the left.
    """
    widths = [max(len(ids) for ids in forward) for forward in zip(*(row.forwards for row in rows), strict=True)]
    total = sum(widths)
    known = [positions_of(model, row) for row in rows]
    axes = max(len(positions) for positions in known)
    ids, mask = torch.zeros(2, len(rows), total, dtype=torch.long)
    positions = torch.zeros(axes, len(rows), total, dtype=torch.long)
    for place, row in enumerate(rows):
        ends = torch.tensor(widths).cumsum(0).tolist()
        columns = torch.cat([torch.arange(end - len(new), end) for end, new in zip(ends, row.forwards, strict=True)])
        ids[place, columns], mask[place, columns] = row.ids[0], 1
        positions[:, place, columns] = known[place].expand(axes, -1)
    logits = []
    for number in forwards or range(len(widths)):
        start, end = sum(widths[:number]), sum(widths[: number + 1])
        shown = [row.pixels[number] for row in rows if number in row.pixels]
        output = model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, :, start:end] if axes > 1 else positions[0, :, start:end],
            past_key_values=cache,
            **_media(shown),
        )
        logits.append(output.logits[:, -1])
    return logits


def converse(
    model: PreTrainedModel, rows: Sequence[Row], recipe: Any, budget: Any, **overrides: Any
) -> tuple[list[Tensor], kvcomp.CompressedCache]:
    """Return the logits of each forward, and the cache."""
    with kvcomp.compress(model, recipe, budget=budget, **overrides) as cache, torch.no_grad():
        return feed(model, cache, rows), cache


def check_row(together: kvcomp.CompressedCache, place: int, alone: kvcomp.CompressedCache, near: float = 1e-4) -> None:
    """Assert that a row of a cache holds what another cache holds of it alone."""
    for layer, reference in zip(together.layers, alone.layers, strict=True):
        for head in range(layer.indices.shape[1]):
            here, there = layer.indices[place, head] >= 0, reference.indices[0, head] >= 0
            assert layer.indices[place, head][here].tolist() == reference.indices[0, head][there].tolist()
            for name in ("counts", "keys", "values"):
                held, expected = getattr(layer, name)[place, head][here], getattr(reference, name)[0, head][there]
                torch.testing.assert_close(held, expected, atol=near, rtol=near)
        if layer.rho is not None:
            torch.testing.assert_close(layer.rho[place], reference.rho[0], equal_nan=True)
    for layer, reference in zip(together.report().layers, alone.report().layers, strict=True):
        for name in ("slots", "tokens"):
            assert getattr(layer, name)[place] == getattr(reference, name)[0]
        for name in ("merged", "evicted"):
            assert abs(getattr(layer, name)[place] - getattr(reference, name)[0]) < 1e-3


def check_rows(
    model: PreTrainedModel, rows: Sequence[Row], recipe: Any, budget: Any, near: float = 1e-4, **overrides: Any
) -> kvcomp.CompressedCache:
    """Assert that each row of a batch says and holds what it does alone; return the cache of the batch."""
    said, together = converse(model, rows, recipe, budget, **overrides)
    for place, row in enumerate(rows):
        expected, alone = converse(model, [row], recipe, budget, **overrides)
        for logits, lone in zip(said, expected, strict=True):
            torch.testing.assert_close(logits[place], lone[0], atol=near, rtol=near)
        check_row(together, place, alone, near)
    return together
