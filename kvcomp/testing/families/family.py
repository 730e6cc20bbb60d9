"""A model family in the small: a seeded model of three layers that transformers builds from a configuration, and
prompts for it that are made by hand, media included. Nothing is downloaded, and no processor is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from kvcomp.core.registry import registry
from kvcomp.testing.envelope.bench import Inputs, left_padded
from kvcomp.testing.envelope.engine import NotClaimedError

Configuration = dict[str, Any]

TEXT: Configuration = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
IMAGE, START, END, VIDEO, AUDIO = 90, 91, 92, 93, 94
ORDINARY = (2, 80)  # tokens without a meaning of their own
LENGTHS = (44, 17, 29)  # of text prompts of the seeds 0, 1, 2
COUNTS = (3, 1, 2)  # of the media in their prompts
SPREAD = 5.0  # times the stock initial weights, with which attention would be all but uniform
NORM_SPREAD = 0.3  # deviation of the weights of norms from where they start
BETWEEN = 5  # ordinary tokens before each medium and after the last


@dataclass(frozen=True)
class Medium:
    """One kind of thing that a prompt may hold beside text.

    Attributes:
        token: the placeholder that the model replaces by features.
        tokens: all that stands for one such thing in a prompt: placeholders and the marks around them.
        tensors: returns what the model's forward takes for `count` of them.
        joined_last: those of the tensors that hold one thing after the other along their last dimension; the others do
            along the first.
    """

    token: int
    tokens: tuple[int, ...]
    tensors: Callable[[torch.Generator, int], Inputs]
    joined_last: tuple[str, ...] = ()


def no_labels(ids: Tensor) -> Inputs:
    """Return nothing: the family tells modalities by token ids alone."""
    return {}


@dataclass(frozen=True)
class Family:
    """A kind of model, in the small.

    Attributes:
        name: as people call it.
        configuration: of the whole model, with `model_type`.
        media: what prompts hold beside text, in this order in turn; none for text models.
        labels: returns inputs with one number for each token `(batch, tokens)` that the family wants beside ids.
        note: what is special about it, for the page of models.
    """

    name: str
    configuration: Configuration
    media: tuple[Medium, ...] = ()
    labels: Callable[[Tensor], Inputs] = no_labels
    note: str = ""

    @property
    def available(self) -> bool:
        """Return whether the installed transformers has the family, or a plugin adds it."""
        registry.entries("adapter")  # plugins are loaded
        return self.configuration["model_type"] in CONFIG_MAPPING

    def model(self, seed: int = 0) -> PreTrainedModel:
        """Return a new model in float32 and evaluation mode; the same weights for the same seed, and the caller's
        random state as it was.
        """
        registry.entries("adapter")  # plugins are loaded, which may add families to transformers
        settings = {name: value for name, value in self.configuration.items() if name != "model_type"}
        config = AutoConfig.for_model(self.configuration["model_type"], **settings)
        builder: Any = AutoModelForImageTextToText if self.media else AutoModelForCausalLM
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model: PreTrainedModel = builder.from_config(config).eval()
            for name, weight in model.named_parameters():
                if weight.ndim == 1 and "norm" in name:  # else keys that are normalised would all have one length
                    weight.add_(torch.randn_like(weight), alpha=NORM_SPREAD)
                elif weight.ndim > 1 and weight.any():
                    weight.mul_(SPREAD)
                elif weight.ndim > 1:  # a projection that starts at zero would hide the images
                    weight.normal_(std=0.1)
        assert model.generation_config is not None
        model.generation_config.suppress_tokens = list(range(ORDINARY[1], TEXT["vocab_size"]))  # an answer has no media
        return model

    def prompt(self, seed: int, media: bool = True) -> Inputs:
        """Return the inputs of a prompt, batch 1. Prompts of the seeds 0, 1 and 2 have very different lengths.

        Args:
            seed: decides tokens, media and length.
            media: whether media stand among the text, where the family takes any.
        """
        generator = torch.Generator().manual_seed(seed)
        if not (media and self.media):
            return self._inputs(_words(generator, LENGTHS[seed % len(LENGTHS)]))
        used = [self.media[place % len(self.media)] for place in range(COUNTS[seed % len(COUNTS)])]
        pieces = [piece for medium in used for piece in (_words(generator, BETWEEN), torch.tensor([medium.tokens]))]
        tensors = self._joined([medium.tensors(generator, 1) for medium in used])
        return self._inputs(torch.cat([*pieces, _words(generator, BETWEEN)], dim=1)) | tensors

    def longer(self, inputs: Mapping[str, Tensor], new: Tensor, media: bool = False) -> Inputs:
        """Return the inputs of the whole conversation that goes on with tokens `new` `(1, tokens)`, and then with one
        more medium where `media` is true.

        Raises:
            NotClaimedError: more media are asked for, and the family takes none.
        """
        if media and not self.media:
            raise NotClaimedError("the family takes text alone")
        pieces, tensors = [inputs["input_ids"], new], self.tensors_of(inputs)
        if media:
            generator = torch.Generator().manual_seed(77)
            pieces += [torch.tensor([self.media[0].tokens]), _words(generator, 3)]
            tensors = self._joined([tensors, self.media[0].tensors(generator, 1)])
        return self._inputs(torch.cat(pieces, dim=1)) | tensors

    def tensors_of(self, inputs: Mapping[str, Tensor]) -> Inputs:
        """Return those of the inputs that do not have one number for each token."""
        shape = inputs["input_ids"].shape
        return {name: value for name, value in inputs.items() if value.shape != shape}

    def left_padded(self, prompts: Sequence[Inputs]) -> Inputs:
        """Return prompts as one batch: what has a number for each token is padded on the left, media are joined."""
        return left_padded(prompts, self._joined_last)

    @property
    def _joined_last(self) -> set[str]:
        return {name for medium in self.media for name in medium.joined_last}

    def _joined(self, parts: list[Inputs]) -> Inputs:
        """Return the media of several prompts as those of one."""
        names = dict.fromkeys(name for part in parts for name in part)
        return {
            name: torch.cat([part[name] for part in parts if name in part], dim=-1 if name in self._joined_last else 0)
            for name in names
        }

    def _inputs(self, ids: Tensor) -> Inputs:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.labels(ids)}


def _words(generator: torch.Generator, tokens: int) -> Tensor:
    return torch.randint(*ORDINARY, (1, tokens), generator=generator)
