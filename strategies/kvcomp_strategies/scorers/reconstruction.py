"""What the model needs to say the context again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Observation, Scorer
from kvcomp.core.types import LayerView
from kvcomp_strategies.observations.reconstruction import (
    LargestReceived,
    SquaresReceived,
    TokenIds,
)


class Reconstruction(Scorer, use="reconstruction"):
    """KVzip (arXiv:2505.23416; snu-mllab/KVzip, `attention/score.py`, `model/wrapper.py`): the context is fed once more
    and attends to its own full cache; a token scores the largest attention that it receives, over the rows and the
    query heads of its KV head. It asks for no question, so one cache serves every question. Costs about one prefill.

    Deviations:

    - probabilities are those of the model, over the whole cache and the chunk itself; the official code normalises
      over the sinks, the chunk's own tokens in the cache, and the chunk, and scores only the chunk's own tokens.
    - no words ask for the repetition unless `instruction` gives their token ids, which belong to one tokenizer; the
      official code asks to "repeat the previous context", and from the second chunk on names the last 8 tokens of the
      chunk before, as `overlap` does.
    - the official code leaves out the system prompt and forces 4 sinks; here `sinks` are 0 unless a recipe says so.
    - tokens that were generated one by one before a later turn are not fed again; they score by what looks at them.

    Attributes:
        chunk, overlap, instruction: see the observation `reconstruction`.
        noise: how many sequences of tokens drawn from the whole vocabulary are read as well, as long as the context
            (not in KVzip). The context looks for what it needs to go on; a question looks for something else, in words
            that the context may not have; words of no meaning look for anything. Of their squares the mean over the
            sequences is added, of the largest the largest counts. Each costs one more prefill.
        received: `"largest"`, or `"squares"` (not in KVzip): the root of the sum of squares over rows and query heads.
            Dropping token j changes the output of row i by about a_ij (o_i - v_j), so that this is the error over all
            rows if values are about equally far from the outputs. The largest says nothing of how many rows look, and a
            head that spreads its attention over tokens which are all alike gives none of them much.
        sinks: how many of the first tokens are protected.
        halving: reconstruct again and again (not in KVzip): from the whole cache, from the better half of it, from the
            better quarter, ... down to the budget, so that tokens which stand in for each other are told from those
            that nothing replaces. What has fallen out scores 0. Costs one more prefill per halving.
    """

    provides = frozenset({"scores", "attention"})

    chunk: int = Field(default=2048, ge=1)
    overlap: int = Field(default=8, ge=0)
    instruction: TokenIds = ()
    noise: int = Field(default=0, ge=0)
    received: Literal["largest", "squares"] = "largest"
    sinks: int = Field(default=0, ge=0)
    halving: bool = False

    def observations(self) -> tuple[Observation, ...]:
        """Return what is received in the second pass: from the context, then from noise."""
        statistic = LargestReceived if self.received == "largest" else SquaresReceived
        context = statistic(chunk=self.chunk, overlap=self.overlap, instruction=self.instruction)
        return (context, statistic(chunk=self.chunk, overlap=0, noise=self.noise)) if self.noise else (context,)

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the attention received, over the readings and the group."""
        received, *others = (layer.observations[reading] for reading in self.observations())
        for noise in others:
            received = received.maximum(noise) if self.received == "largest" else received + noise / self.noise
        grouped = rearrange(received, "b (kv group) t -> b kv group t", kv=layer.shape[1])
        return grouped.amax(dim=2) if self.received == "largest" else grouped.sum(dim=2).sqrt()

    def protect(self, layer: LayerView, slots: Tensor) -> Tensor | None:
        """Return the sinks."""
        return layer.valid & (layer.indices < self.sinks) if self.sinks else None

    def rounds(self, tokens: Tensor, slots: Tensor) -> Sequence[Tensor]:
        """Return a half, a quarter, ... of the tokens, as long as that is above the budget."""
        if not self.halving:
            return ()
        halves = int(torch.log2(tokens / slots.clamp(min=1)).amax().ceil())
        shares = [(tokens // 2**half).maximum(slots) for half in range(1, halves + 1)]
        return [share for share in shares if bool((share > slots).any())]
