"""From a prompt and images to the inputs of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from kvcomp.core.errors import InputError


def encode_prompt(processor: Any, prompt: str, images: Sequence[Image.Image], multimodal: bool) -> Mapping[str, Any]:
    """Return the inputs of `generate`: the images, then the prompt, as one user message.

    A text model without a chat template is given the prompt as it is.

    Raises:
        InputError: a multimodal processor has no chat template, so nothing says where the images go; or the processor
            refuses an image or the prompt.
    """
    try:
        return _encode(processor, prompt, images, multimodal)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the model's processor cannot use this prompt: {error}") from None


def _encode(processor: Any, prompt: str, images: Sequence[Image.Image], multimodal: bool) -> Mapping[str, Any]:
    if getattr(processor, "chat_template", None):
        content: Any = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content if multimodal else prompt}]
        options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        encoded: Mapping[str, Any] = processor.apply_chat_template(messages, **options)
    elif images:
        raise InputError("the model's processor has no chat template, so nothing says where the images go")
    else:
        encoded = processor(text=prompt, return_tensors="pt")
    return encoded


def move(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return the inputs on the model's device, real numbers in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.dtype.is_floating_point else None)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def count_tokens(inputs: Mapping[str, Any]) -> int:
    """Return the length of the prompt in tokens."""
    ids: Tensor = inputs["input_ids"]
    return ids.shape[1]
