"""What a text model was given for its tokens, kept so that it can be given once more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvcomp.core.errors import UnsupportedUseError

# What a text model is given per token that is known: fed again, made anew, or read by nothing below the outer model.
UNDERSTOOD = frozenset(
    (
        *("input_ids", "inputs_embeds", "position_ids", "attention_mask", "cache_position"),
        *("token_type_ids", "mm_token_type_ids", "labels"),
    )
)
MARKED = {"deepstack_visual_embeds": "visual_pos_masks"}  # features of several layers, of the tokens that a mask marks
EVERY = "per_layer_inputs"  # embeddings of several layers, of every token


@dataclass(frozen=True, eq=False)
class Fed:
    """The tokens of a forward of the text model, or of several.

    Attributes:
        tokens: ids `(batch, tokens)`, or embeddings `(batch, tokens, hidden)`.
        more: what the text model takes beside them, `(batch, tokens, ...)` each. Features of marked tokens alone are
            `(batch, tokens, layers, hidden)` here, zero for the others: as many bytes per layer as the embeddings.
    """

    tokens: Tensor
    more: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Fed:
        """Return what a forward of the text model was given, by name.

        Raises:
            UnsupportedUseError: it was given more, which nothing says how to feed again.
        """
        given = {name: value for name, value in inputs.items() if _holds_tensors(value)}
        more = {EVERY: given[EVERY]} if EVERY in given else {}
        for name, marks in MARKED.items():
            if name in given and marks in given:
                more |= {marks: given[marks], name: _spread(given[name], given[marks])}
        if foreign := sorted(given.keys() - UNDERSTOOD - more.keys()):
            raise UnsupportedUseError(
                "a second pass feeds ids or embeddings and positions to the text model once more, and this model takes "
                f"{', '.join(foreign)} as well; use a scorer without a second pass"
            )
        return cls(given["input_ids" if "input_ids" in given else "inputs_embeds"], more)

    @classmethod
    def joined(cls, decoder: Any, several: Sequence[Fed]) -> Fed:
        """Return the tokens of several forwards as one, as embeddings where any of them were.

        Raises:
            UnsupportedUseError: some were given what the others would need too.
        """
        if len(several) == 1:
            return several[0]
        tokens = [fed.tokens for fed in several]
        if any(one.dim() != tokens[0].dim() for one in tokens):
            tokens = [_embedded(decoder, one) if one.dim() == 2 else one for one in tokens]
        examples = {name: tensor for fed in several for name, tensor in fed.more.items()}
        more = {
            name: torch.cat(
                [fed.more[name] if name in fed.more else _of_text(name, like, fed.tokens.shape[1]) for fed in several],
                dim=1,
            )
            for name, like in examples.items()
        }
        return cls(torch.cat(tokens, dim=1), more)

    def at(self, places: Tensor) -> Fed:
        """Return the tokens at these places of each row, `(batch, tokens)` int64."""
        return Fed(_gathered(self.tokens, places), {name: _gathered(one, places) for name, one in self.more.items()})

    def behind(self, ids: Tensor, decoder: Any) -> Fed:
        """Return the tokens with text before them, `(batch, tokens)` ids.

        Raises:
            UnsupportedUseError: text needs more than ids, and nothing says what.
        """
        before = ids if self.tokens.dim() == 2 else _embedded(decoder, ids)
        more = {name: torch.cat([_of_text(name, one, ids.shape[1]), one], dim=1) for name, one in self.more.items()}
        return Fed(torch.cat([before, self.tokens], dim=1), more)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the text model, by name."""
        more: dict[str, Any] = dict(self.more)
        for name, marks in MARKED.items():
            if name in more:
                more[name] = list(more[name][more[marks]].unbind(dim=1))
        return {"input_ids" if self.tokens.dim() == 2 else "inputs_embeds": self.tokens, **more}


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_holds_tensors, value)))


def _spread(features: Sequence[Tensor], marks: Tensor) -> Tensor:
    """Return the features of each layer, `(marked tokens, hidden)`, at the tokens marked `(batch, tokens)`: `(batch,
    tokens, layers, hidden)`.
    """
    stacked = torch.stack(list(features), dim=1)
    spread = stacked.new_zeros(*marks.shape, *stacked.shape[1:])
    spread[marks.to(stacked.device)] = stacked
    return spread


def _of_text(name: str, like: Tensor, tokens: int) -> Tensor:
    """Return what text is given of a further input: no mark and no features."""
    if name == EVERY:
        raise UnsupportedUseError(
            f"every token of this model needs {EVERY}, and text that a second pass adds, or a forward of ids alone, "
            "has none; leave out the scorer's instruction, and feed the prompt through the outer model"
        )
    return like.new_zeros(like.shape[0], tokens, *like.shape[2:])


def _gathered(per_token: Tensor, places: Tensor) -> Tensor:
    wide = places.view(*places.shape, *[1] * (per_token.dim() - 2)).expand(-1, -1, *per_token.shape[2:])
    return per_token.gather(1, wide)


def _embedded(decoder: Any, ids: Tensor) -> Tensor:
    embedded: Tensor = decoder.get_input_embeddings()(ids)
    return embedded
