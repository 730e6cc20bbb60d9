"""The share of attention that crosses modalities."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from kvcomp.core.interfaces import Observation
from kvcomp.core.types import AttentionBlock, Modality, compared_modality

Flow = tuple[Tensor, Tensor]  # attention to other modalities, and to all tokens, each (batch, heads)


class CrossModalFlow(Observation, use="cross-modal-flow"):
    """The inner fraction of FlowMM's Eq. 6 per query head, `(batch, heads)` float32: attention to keys of another
    modality / all attention.

    The mean over heads is the policy's work. Images and videos are one modality, the paper's visual tokens; audio is a
    third, and "heterogeneous" means any other. Only image, video and audio placeholders are non-text; the special
    tokens around them are text (row r of the FlowMM card).

    The sum of Eq. 7 runs over all rows of the prompt. It is exact up to `exact` queries; above, one seeded random row
    in each of `strata` equal strata estimates it (a fixed stride would alias with the period of the image layout).
    The error of the estimate is measured in the explanation page "How a cache is compressed".

    Attributes:
        exact: up to this many valid queries of a row, all of them are used.
        strata: number of sampled rows above that.
        rows_used: `"sampled"` as described, or `"all"` for the exact sum at any length.
        seed: of the sampled rows; the same rows for a prompt of the same length, in any batch.
    """

    exact: int = Field(default=512, ge=1)
    strata: int = Field(default=128, ge=1)
    rows_used: Literal["sampled", "all"] = "sampled"
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _samples_are_fewer(self) -> CrossModalFlow:
        if self.strata > self.exact:
            raise ValueError(f"strata must be at most exact ({self.exact})")
        return self

    def rows(self, valid: Tensor, modality: Tensor) -> Tensor | None:
        """Return the sampled queries of each row, or None for all of them."""
        if self.rows_used == "all" or valid.shape[1] <= self.exact:
            return None
        tokens = valid.sum(dim=-1, keepdim=True)  # (batch, 1)
        ranks = self._sampled_ranks(tokens)
        # Padded rows may be short enough to be exact. One sync on an accelerator, since it decides a shape.
        if not bool(valid.all()):
            every = torch.arange(self.exact, device=valid.device)
            all_ranks = torch.where(every < tokens, every, -1)
            ranks = torch.where(tokens <= self.exact, all_ranks, F.pad(ranks, (0, self.exact - self.strata), value=-1))
        order = (~valid).to(torch.uint8).argsort(dim=-1, stable=True)  # valid queries first, in order
        return order.gather(1, ranks.clamp(min=0)).masked_fill(ranks < 0, -1)

    def _sampled_ranks(self, tokens: Tensor) -> Tensor:
        """Return one rank in each stratum, `(batch, strata)`, for rows of `tokens` `(batch, 1)` valid queries."""
        generator = torch.Generator().manual_seed(self.seed)
        offset = torch.rand(self.strata, generator=generator, dtype=torch.float64).to(tokens.device)
        edges = torch.arange(self.strata + 1, device=tokens.device) * tokens // self.strata
        start, end = edges[:, :-1], edges[:, 1:]
        return start + (offset * (end - start)).long()

    def update(self, state: Flow | None, block: AttentionBlock) -> Flow:
        """Return the flow with the block's rows added."""
        batch, heads, rows, seen = block.leading.shape
        every = torch.arange(-1, len(Modality), device=block.modality.device)[:, None]  # all keys are foreign to -1
        foreign = (compared_modality(block.modality)[:, :, None, :seen] != every) & block.valid[:, :, None, :seen]
        foreign = foreign.to(block.leading.dtype)  # (batch, kv_heads, 1 + modalities, seen)
        grouped = block.leading.view(batch, foreign.shape[1], -1, seen)  # query heads of a group one after another
        flow = (grouped @ foreign.transpose(-1, -2)).view(batch, heads, rows, -1)
        other = compared_modality(block.row_modality).long()[:, None, :, None].expand(-1, heads, -1, 1) + 1
        crossing, total = flow.gather(3, other).sum(dim=(2, 3)), flow[..., 0].sum(dim=2)
        return (crossing, total) if state is None else (state[0] + crossing, state[1] + total)

    def result(self, state: Flow) -> Tensor:
        """Return the share of attention that crosses modalities, per query head."""
        crossing, total = state
        return crossing / total.clamp(min=torch.finfo(total.dtype).tiny)
