"""Seeded random prompts, as one attention layer sees them: queries, keys, values, modalities, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from kvcomp.core.attention import AttentionInputs
from kvcomp.core.rotary import Rotary
from kvcomp.core.types import LayerView, Modality

FILLS = ("normal", "zero", "equal", "extreme", "mixed")
PER_TOKEN = ("modality", "valid", "indices", "counts")
RUN_LENGTH = 6  # longest run of one modality
ROTARY_BASE = 1e4
HIDDEN = 12  # size of the layer's output


@dataclass(frozen=True, eq=False)
class Sample:
    """What one layer saw and holds.

    Attributes:
        queries: `(batch, heads, queries, head_dim)`, of the last tokens on the axis.
        keys, values: `(batch, kv_heads, tokens, head_dim)`.
        modality, valid, indices, counts: `(batch, kv_heads, tokens)`, as in `LayerView`.
        label: how it was made, for messages.
        layer, layers: place in the model.
        output: `(heads, hidden, head_dim)`, W_O of each query head, or None.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    modality: Tensor
    valid: Tensor
    indices: Tensor
    counts: Tensor
    label: str = ""
    layer: int = 1
    layers: int = 3
    output: Tensor | None = None

    def __repr__(self) -> str:
        return f"Sample({self.label})"

    def inputs(self) -> AttentionInputs:
        """Return what the attention of this layer saw: causal by place, pads hidden."""
        queries, tokens = self.queries.shape[2], self.keys.shape[2]
        places = torch.arange(tokens)
        causal = places <= places[-queries:, None]
        visible = (causal & self.valid[:, :, None]).repeat_interleave(
            self.queries.shape[1] // self.keys.shape[1], dim=1
        )
        rotary = self.rotary()
        return AttentionInputs(
            queries=self.queries,
            keys=self.keys,
            query_columns=places[-queries:],
            key_columns=places.expand(1, 1, -1),
            query_modality=self.modality[:, 0, -queries:],
            query_valid=self.valid[:, 0, -queries:],
            modality=self.modality,
            valid=self.valid,
            mask=visible,
            scaling=self.keys.shape[-1] ** -0.5,
            rotary=Rotary(rotary.cos[:, :1, -queries:], rotary.sin[:, :1, -queries:]),
        )

    def view(self) -> LayerView:
        """Return the view of it, without observations."""
        return LayerView(
            self.keys,
            self.values,
            self.modality,
            self.valid,
            self.indices,
            self.counts,
            positions=self.indices.clamp(min=0)[None],
            layer=self.layer,
            layers=self.layers,
            rotary=self.rotary(),
            output=self.output,
        )

    def rotary(self) -> Rotary:
        """Return rotations by the place of each token, of all coordinates but the last two."""
        pairs = max(1, self.keys.shape[-1] // 2 - 1)
        angles = self.indices.clamp(min=0)[..., None] * ROTARY_BASE ** -(torch.arange(pairs) / pairs)
        return Rotary(angles.cos(), angles.sin())

    def rows(self, order: Sequence[int]) -> Sample:
        """Return these rows of the batch, in this order."""
        return self._take(list(order), dim=0)

    def heads(self, order: Sequence[int]) -> Sample:
        """Return the KV heads, each with its group of query heads, in this order."""
        grouped = rearrange(self.queries, "b (kv group) q d -> b kv group q d", kv=self.keys.shape[1])
        queries = grouped[:, list(order)].flatten(1, 2)
        output = self.output
        if output is not None:
            output = rearrange(output, "(kv group) hidden d -> kv group hidden d", kv=self.keys.shape[1])
            output = output[list(order)].flatten(0, 1)
        return replace(self._take(list(order), dim=1), queries=queries, output=output)

    def alone(self, row: int) -> Sample:
        """Return one row as a batch of its own, without padding."""
        lone = self.rows([row])
        held = lone.valid[0].any(dim=0)
        queries = held[-self.queries.shape[2] :]
        fields = {name: getattr(lone, name)[:, :, held] for name in ("keys", "values", *PER_TOKEN)}
        return replace(lone, queries=lone.queries[:, :, queries], **fields)

    def _take(self, order: list[int], dim: int) -> Sample:
        names = ("keys", "values", *PER_TOKEN, *(("queries",) if dim == 0 else ()))
        index = (slice(None),) * dim + (order,)
        return replace(self, **{name: getattr(self, name)[index] for name in names})


def make_sample(
    seed: int,
    lengths: Sequence[int] = (24,),
    *,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    fill: str = "normal",
    modalities: Sequence[Modality] = (Modality.TEXT, Modality.IMAGE),
    held: int = 0,
    layer: int = 1,
) -> Sample:
    """Return a random sample; the same arguments give the same bits.

    Args:
        seed: of everything random.
        lengths: valid tokens of each row; shorter rows are padded on the left.
        kv_heads: number of KV heads.
        group: query heads per KV head.
        head_dim: size of a head.
        dtype: of queries, keys and values.
        fill: one of `FILLS`: what the vectors look like.
        modalities: what the runs of tokens are made of; a single one gives a prompt of one modality.
        held: slots before the new tokens, as after an earlier compression: some empty, heads that differ, counts above
            one.
        layer: number of the layer.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, new = len(lengths), max(lengths)
    valid = torch.arange(new) >= new - torch.tensor(list(lengths))[:, None]  # (batch, new)
    modality = _modalities(batch, held + new, modalities, generator)
    valid = torch.cat([_held(batch, kv_heads, held, generator), valid[:, None].expand(-1, kv_heads, -1)], dim=2)
    counts = torch.ones(valid.shape)
    counts[..., :held] = torch.randint(1, 4, (batch, kv_heads, held), generator=generator).float()
    shapes = [(batch, kv_heads * group, new)] + [(batch, kv_heads, held + new)] * 2
    queries, keys, values = (_vectors((*shape, head_dim), fill, dtype, generator) for shape in shapes)
    return Sample(
        queries,
        keys,
        values,
        modality[:, None].expand(valid.shape),
        valid,
        _indices(valid, held),
        counts.masked_fill(~valid, 0.0) if held else counts,
        label=_label(seed, lengths, fill, held, queries, keys, modalities),
        layer=layer,
        output=torch.randn(kv_heads * group, HIDDEN, head_dim, generator=generator).to(dtype),
    )


def _label(
    seed: int,
    lengths: Sequence[int],
    fill: str,
    held: int,
    queries: Tensor,
    keys: Tensor,
    modalities: Sequence[Modality],
) -> str:
    heads = f"{keys.shape[1]} kv_heads in groups of {queries.shape[1] // keys.shape[1]}, head_dim {keys.shape[3]}"
    dtype, names = str(keys.dtype).removeprefix("torch."), "/".join(choice.name.lower() for choice in modalities)
    return f"seed {seed}, {fill} {dtype}, rows of {list(lengths)} {names} after {held} held, {heads}"


def _held(batch: int, kv_heads: int, held: int, generator: torch.Generator) -> Tensor:
    """Return which held slots are filled: heads that keep fewer have empty slots at the end."""
    filled = torch.randint(0, held + 1, (batch, kv_heads, 1), generator=generator)
    return torch.arange(held) < filled


def _indices(valid: Tensor, held: int) -> Tensor:
    """Return logical positions: held slots are every third token of what came before, new tokens continue."""
    place = valid.cumsum(dim=-1) - 1
    before = torch.arange(held) * 3
    new = 3 * held + valid[..., held:].cumsum(dim=-1) - 1
    place = torch.cat([before.expand(*valid.shape[:2], -1), new], dim=-1) if held else place
    return place.masked_fill(~valid, -1).int()


def _modalities(batch: int, tokens: int, choices: Sequence[Modality], generator: torch.Generator) -> Tensor:
    """Return runs of modalities, `(batch, tokens)` int8."""
    rows = torch.zeros(batch, tokens, dtype=torch.int8)
    for row in rows:
        start = 0
        while start < tokens:
            run, choice = torch.randint(1 << 16, (2,), generator=generator).tolist()
            row[start : start + 1 + run % RUN_LENGTH] = int(choices[choice % len(choices)])
            start += 1 + run % RUN_LENGTH
    return rows


def _vectors(shape: tuple[int, ...], fill: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=generator)
    if fill == "zero":
        normal = torch.zeros(shape)
    elif fill == "equal":
        normal = normal[:, :, :1].expand(shape)
    elif fill in ("extreme", "mixed"):
        largest = extreme(dtype)
        picked = torch.randint(0, 3, shape[:-1], generator=generator)[..., None]
        wild = torch.where(picked == 0, largest * normal.sign(), torch.where(picked == 1, 0.0, normal / largest))
        usual = torch.rand(shape[:-1], generator=generator)[..., None] < 0.5
        normal = torch.where(usual, normal, wild) if fill == "mixed" else wild
    return normal.to(dtype).contiguous()


def extreme(dtype: torch.dtype) -> float:
    """Return the largest magnitude that attention itself survives: the largest float16, and 1e15 otherwise (a
    product of two, over a head, must stay finite in float32).
    """
    return float(torch.finfo(dtype).max) if dtype == torch.float16 else 1e15
