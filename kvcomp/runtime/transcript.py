"""Which tokens a cache has seen, so that a later turn of another conversation is told from one of this one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.core.errors import InputError

UNKNOWN = -1  # the id of a token that came as an embedding, or by a compiled decode step
FOLD = 64  # decoded tokens that wait to be joined to those before them


@dataclass(frozen=True, eq=False)
class Transcript:
    """The ids of the columns that a cache has seen, padding counted, `(batch, columns)` int32 in parts of columns.

    Four bytes per token and row, once per cache.
    """

    parts: tuple[Tensor, ...] = ()

    @property
    def ids(self) -> Tensor | None:
        """Return all ids, `(batch, columns)` int32; None before the first token."""
        return _joined(self.parts) if self.parts else None

    def then(self, given: Tensor, seen: int) -> Transcript:
        """Return the transcript with the tokens of one more forward.

        Args:
            given: ids `(batch, tokens)`, or embeddings `(batch, tokens, hidden)`, whose ids are unknown.
            seen: columns before them. Where fewer are known of, the last of them are unknown.
        """
        batch, tokens = given.shape[:2]
        ids = given.to(torch.int32, copy=True) if given.dim() == 2 else _unknown(batch, tokens, given.device)
        missed = seen - sum(part.shape[1] for part in self.parts)
        parts = (*self.parts, _unknown(batch, missed, ids.device), ids) if missed else (*self.parts, ids)
        return Transcript(parts if len(parts) <= FOLD else (_joined(parts),))

    def rows(self, rows: Tensor) -> Transcript:
        """Return the transcript of these rows of the batch, `(rows,)` int64."""
        return self if (ids := self.ids) is None else Transcript((ids.index_select(0, rows.to(ids.device)),))

    def first(self, columns: int) -> Transcript:
        """Return the transcript of the first columns."""
        return self if (ids := self.ids) is None else Transcript((ids[:, :columns].clone(),))

    def check_begins(self, conversation: Tensor, mask: Tensor) -> None:
        """Raise where a conversation does not begin with these tokens.

        Args:
            conversation: ids of the whole of it, `(batch, tokens)`, no fewer tokens than there are columns.
            mask: which of them are no padding, `(batch, tokens)`.

        Raises:
            InputError: naming the first token that differs.
        """
        ids = self.ids
        if ids is None or len(ids) != len(conversation):  # another number of rows is refused by the forward
            return
        given = conversation[:, : ids.shape[1]].to(ids.device)
        real = mask[:, : ids.shape[1]].to(ids.device).bool()
        others = ((given != ids) & (ids != UNKNOWN) & real).nonzero()  # one sync per later turn
        if not len(others):
            return
        column, row = min((column, row) for row, column in others.tolist())
        where = f"token {column}" if len(ids) == 1 else f"token {column} of row {row}"
        raise InputError(
            f"the next turn must begin with the {ids.shape[1]} tokens that the cache has seen, and from {where} on it "
            f"does not: id {int(given[row, column])} was given, and the cache has seen {int(ids[row, column])}. Chat "
            "templates that drop or rewrite earlier turns do this; append the new turn to the ids that generate() "
            "returned, or give the whole conversation to a new cache"
        )


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """Return all parts on the device of the first: ids come from wherever a model that is spread over devices took
    them.
    """
    return torch.cat([part.to(parts[0].device) for part in parts], dim=1)


def _unknown(batch: int, columns: int, device: torch.device) -> Tensor:
    return torch.full((batch, columns), UNKNOWN, dtype=torch.int32, device=device)
