"""What a feature is tried on: one method, one family's tiny model, and prompts for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvcomp.runtime.cache_argument import CACHE
from kvcomp.testing.envelope.engine import Engine
from kvcomp.testing.failures import require_close, require_same

RATIO = 0.4
NEW = 5  # decoded tokens of an answer
PROMPTS = (0, 1, 2)  # seeds; each family makes prompts of very different lengths of them
TOLERANCE = 2e-4  # of logits that are computed in another order; those of tiny models are about 1

Inputs = dict[str, Tensor]


class Family(Protocol):
    """A kind of model, as the features see it."""

    @property
    def name(self) -> str:
        """Return its name."""

    def model(self) -> Any:
        """Return a new model, in float32 and evaluation mode; the same weights every time."""

    def prompt(self, seed: int, media: bool = True) -> Inputs:
        """Return the inputs of one prompt, batch 1: with media where the family takes any, and text alone without.

        Prompts of the seeds 0, 1 and 2 have very different lengths.

        Raises:
            NotClaimedError: the family cannot do without media.
        """

    def longer(self, inputs: Mapping[str, Tensor], new: Tensor, media: bool = False) -> Inputs:
        """Return the inputs of the whole conversation that goes on with tokens `new` `(1, tokens)`, and then with one
        more image (or whatever the family takes) where `media` is true.

        Raises:
            NotClaimedError: more media are asked for, and the family takes none.
        """

    def left_padded(self, prompts: Sequence[Inputs]) -> Inputs:
        """Return prompts as one batch."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model said: `ids` `(batch, new)` and `logits` `(batch, new, vocabulary)`."""

    ids: Tensor
    logits: Tensor

    def row(self, place: int) -> Answer:
        """Return one row as a batch of its own."""
        return Answer(self.ids[place : place + 1], self.logits[place : place + 1])


@dataclass(frozen=True, eq=False)
class Bench:
    """One method on one model.

    Attributes:
        engine: the method.
        family: makes models and prompts.
        model: what is compressed.
        ratio: what is kept: `RATIO`, or the least above it that the method can do with.
        token_bytes: of one token in a stock cache, measured before anything is compressed: a library that hooks the
            model would compress that cache too.
    """

    engine: Engine
    family: Family
    model: Any
    ratio: float
    token_bytes: float

    @classmethod
    def of(cls, engine: Engine, family: Family, model: Any | None = None) -> Bench:
        """Return a bench with a model of its own, or this one."""
        bench = cls(engine, family, family.model() if model is None else model, RATIO, 0.0)
        bench = replace(bench, token_bytes=token_bytes(bench.model, bench.prompt()))
        return replace(bench, ratio=max(engine.least(RATIO, bench.model, prompt) for prompt in bench.rows()))

    def rows(self) -> list[Inputs]:
        """Return prompts of very different lengths, with media where the family takes any."""
        return [self.prompt(seed) for seed in PROMPTS]

    def padded(self, prompts: Sequence[Inputs] | None = None) -> Inputs:
        """Return prompts, by default those of `rows()`, as one batch, padded on the left."""
        return self.family.left_padded(self.rows() if prompts is None else prompts)

    def prompt(self, seed: int = PROMPTS[0], media: bool = True) -> Inputs:
        """Return the family's prompt of a seed, numbers in the dtype of the model."""
        inputs = self.family.prompt(seed, media)
        return {
            name: value.to(self.model.dtype) if value.is_floating_point() else value for name, value in inputs.items()
        }

    def compressing(self, ratio: float | None = None, **options: Any) -> AbstractContextManager[Any]:
        """Give a cache of the engine inside the block."""
        return self.engine.compressing(self.model, self.ratio if ratio is None else ratio, **options)

    @contextmanager
    def prefilled(self, inputs: Mapping[str, Tensor], **options: Any) -> Iterator[Any]:
        """Give a cache that has seen a prompt, inside its block."""
        with self.compressing(**options) as cache, torch.no_grad():
            if inputs.keys() == {"input_ids", "attention_mask"}:  # else the model finds positions of its media itself
                positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
                inputs = {**inputs, "position_ids": positions}
            self.model(**inputs, **{CACHE: cache})
            yield cache

    def feed(self, cache: Any, ids: Tensor) -> Tensor:
        """Return the logits of the last of more text tokens `(1, tokens)`, `(1, vocabulary)`, by one bare forward.

        Positions are given: M-RoPE models keep an offset of whoever called last, of another batch perhaps.
        """
        positions = cache.get_seq_length() + torch.arange(ids.shape[1])[None]
        logits: Tensor = self.model(input_ids=ids, position_ids=positions, **{CACHE: cache}).logits[:, -1]
        return logits

    def answer(self, inputs: Mapping[str, Tensor], ratio: float | None = None, **settings: Any) -> Answer:
        """Return what the model says with a compressed cache of its own."""
        with self.compressing(ratio) as cache:
            return self.generate(inputs, cache, **settings)

    def stock(self, inputs: Mapping[str, Tensor], **settings: Any) -> Answer:
        """Return what the model says with transformers' own cache."""
        return self.generate(inputs, DynamicCache(config=self.model.config), **settings)

    def generate(self, inputs: Mapping[str, Any], cache: Any = None, new: int = NEW, **settings: Any) -> Answer:
        """Return what the model says, greedily unless the settings say otherwise. A cache may be among the inputs."""
        options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
        given = dict(inputs) if cache is None else {**inputs, CACHE: cache}
        output = self.model.generate(**given, **options | settings, output_logits=True, return_dict_in_generate=True)
        return Answer(output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, dim=1))


def token_bytes(model: Any, prompt: Mapping[str, Tensor]) -> float:
    """Return what one token takes in a stock cache, in the layers with full attention; outside any compression."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prompt, **{CACHE: cache})
    full: list[Any] = [layer for layer in cache.layers if type(layer) is DynamicLayer]
    held: int = sum(layer.keys.nbytes + layer.values.nbytes for layer in full)
    return held / prompt["input_ids"].shape[1]


def left_padded(prompts: Sequence[Mapping[str, Tensor]], joined_last: Collection[str] = ()) -> Inputs:
    """Return prompts as one batch: what has a number per token is padded on the left with 0, media are joined along
    their first dimension, those named in `joined_last` along their last.

    >>> left_padded([{"input_ids": torch.tensor([[5, 6]])}, {"input_ids": torch.tensor([[7]])}])["input_ids"].tolist()
    [[5, 6], [0, 7]]
    """
    width = max(prompt["input_ids"].shape[1] for prompt in prompts)
    joined: dict[str, list[Tensor]] = {}
    for prompt in prompts:
        for name, value in prompt.items():
            short = width - prompt["input_ids"].shape[1]
            if value.shape == prompt["input_ids"].shape:
                value = torch.nn.functional.pad(value, (short, 0))
            joined.setdefault(name, []).append(value)
    return {name: torch.cat(values, dim=-1 if name in joined_last else 0) for name, values in joined.items()}


def require_same_answer(one: Answer, other: Answer, seen: str) -> None:
    """Raise unless two answers are the same tokens, from logits that agree up to rounding."""
    require_close(one.logits[:, 0], other.logits[:, 0], TOLERANCE, f"logits of the first token of {seen}")
    require_same(one.ids, other.ids, f"tokens of {seen}")
    require_close(one.logits, other.logits, TOLERANCE, f"logits of {seen}")
