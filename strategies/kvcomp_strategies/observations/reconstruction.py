"""The attention that each token receives while the context is fed once more."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from torch import Tensor

from kvcomp.core.interfaces import Observation
from kvcomp.core.types import AttentionBlock, Repeat


def _as_tuple(ids: Any) -> Any:
    return tuple(ids) if isinstance(ids, list) else ids


TokenIds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_as_tuple)]
"""Token ids of a model's own tokenizer; a list in a file."""


class SecondReading(Observation):
    """A statistic of the rows of a second pass.

    Attributes:
        chunk: tokens that are fed at a time; each chunk attends to the whole context and to itself.
        overlap: tokens before each later chunk that are fed with it, so that its first token is preceded by what
            precedes it in the context.
        instruction: token ids fed before each chunk, such as those of "Repeat the previous context:".
        noise: how many sequences of tokens drawn from the whole vocabulary are fed in the place of each chunk, as long
            as the chunk; each attends to the whole context and to itself. 0 to feed the chunk.
    """

    carried = True
    prefill_only = "the context would have to be fed again"

    chunk: int = Field(default=2048, ge=1)
    overlap: int = Field(default=8, ge=0)
    instruction: TokenIds = ()
    noise: int = Field(default=0, ge=0)

    def repeat(self) -> Repeat:
        """Return how the context is fed once more."""
        return Repeat(self.chunk, self.overlap, self.instruction, self.noise)


class LargestReceived(SecondReading, use="reconstruction"):
    """Largest attention probability that each token receives from the rows of a second pass, `(batch, heads, tokens)`
    float32: KVzip's context reconstruction (arXiv:2505.23416; snu-mllab/KVzip, `attention/score.py`).

    Carried: a slot keeps the largest of all turns. Deviations are listed at the scorer `reconstruction`.
    """

    def update(self, state: Tensor | None, block: AttentionBlock) -> Tensor:
        """Return the largest so far."""
        largest = block.widened(block.leading.amax(dim=2))
        return largest if state is None else state.maximum(largest)

    def join(self, before: Tensor, now: Tensor) -> Tensor:
        """Return the larger."""
        return before.maximum(now)


class SquaresReceived(SecondReading, use="reconstruction-squares"):
    """Sum of the squared attention probabilities that each token receives from the rows of a second pass,
    `(batch, heads, tokens)` float32 (ours).

    Carried: a slot keeps the sum of all turns.
    """

    def update(self, state: Tensor | None, block: AttentionBlock) -> Tensor:
        """Return the sum so far."""
        squares = block.widened(block.leading.square().sum(dim=2))
        return squares if state is None else state + squares
