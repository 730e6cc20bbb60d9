"""What kvcomp must know about a model family. One generic adapter serves nearly all; see `kvcomp_adapters`."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor, nn

from kvcomp.core.errors import PluginWarning
from kvcomp.core.registry import registry


class ModelAdapter(ABC):
    """Translates a model family's inputs into kvcomp's words.

    Args:
        config: the model's configuration, text and vision parts included.
    """

    use: ClassVar[str] = ""
    generic: ClassVar[bool] = False  # tried after all others

    def __init_subclass__(cls, use: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if use is not None:
            cls.use = use

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def matches(cls, config: Any) -> bool:
        """Return whether this adapter serves models with this configuration."""

    @property
    def obstacle(self) -> str | None:
        """Return why the cache of models with this configuration cannot be compressed, as the end of a sentence that
        begins with the model's name; None where nothing is known to stand against it.
        """
        return None

    def modality(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the `Modality` of each new token, `(batch, tokens)` int8; None where all are text.

        Args:
            inputs: what the model's forward was called with.

        Raises:
            UnsupportedUseError: a multimodal model was called in a way that hides which tokens are which.
        """
        return None

    def output_projection(self, attention: nn.Module) -> Tensor | None:
        """Return the weight W_O of an attention module, `(hidden, heads * head_dim)`, aliasing the model's; None where
        it cannot be told.
        """
        return None


def per_head(weight: Tensor | None, heads: int) -> Tensor | None:
    """Return the columns of W_O that belong to each query head, `(heads, hidden, head_dim)`, a view."""
    return None if weight is None else rearrange(weight.detach(), "hidden (heads d) -> heads hidden d", heads=heads)


def adapter_for(config: Any) -> ModelAdapter:
    """Return the first registered adapter that matches the configuration, the specific ones before the generic."""
    adapters: list[type[ModelAdapter]] = [entry.value for entry in registry.entries("adapter")]
    for adapter in sorted(adapters, key=lambda adapter: adapter.generic):
        try:
            matches = adapter.matches(config)
        except Exception as error:
            message = f"adapter {adapter.use!r} failed and was skipped: {type(error).__name__}: {error}"
            warnings.warn(message, PluginWarning, stacklevel=2)
        else:
            if matches:
                return adapter(config)
    raise AssertionError("the generic adapter matches every configuration")
