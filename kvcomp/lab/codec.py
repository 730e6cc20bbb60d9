"""From samples to a model's inputs, and from its output to text: a Hugging Face processor, asked in our words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from torch import Tensor

from kvcomp.core.errors import InputError
from kvcomp.lab.tasks import Sample


@dataclass(frozen=True)
class Outline:
    """A prompt in which every image is still one placeholder.

    Attributes:
        text: as the chat template writes it.
        ids: its tokens.
        offsets: for each token, the first character and the one after its last; empty where the tokenizer cannot say.
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


class Codec:
    """A processor with a chat template.

    Args:
        processor: as `AutoProcessor` loads it.

    Raises:
        InputError: it has no chat template, so nothing says where images go.
    """

    def __init__(self, processor: Any) -> None:
        if not getattr(processor, "chat_template", None):
            raise InputError("the testbed's processor must have a chat template, and this one has none")
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)

    def encode(self, samples: Sequence[Sample]) -> Mapping[str, Tensor]:
        """Return the inputs of `model.generate` for a batch of samples, padded on the left.

        Raises:
            InputError: the processor does not take one of them, such as an image that is too narrow for it.
        """
        try:
            batch: Mapping[str, Tensor] = self.processor.apply_chat_template(
                [sample.messages() for sample in samples],
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
            )
        except Exception as error:  # of foreign code, which says in any type what it cannot take
            name = type(self.processor).__name__
            raise InputError(f"a prompt must be one that {name} takes, and it says: {error}") from error
        return batch

    def decode(self, ids: Tensor) -> list[str]:
        """Return the text of each row of new token ids, special tokens left out."""
        texts: list[str] = self.processor.batch_decode(ids, skip_special_tokens=True)
        return texts

    def encode_answer(self, sample: Sample) -> list[int]:
        """Return the tokens of the reference answer, without the one that ends it."""
        return self.encode_text(sample.answer)

    def encode_text(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode_text(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        text: str = self.tokenizer.decode(ids)
        return text

    @cached_property
    def marks(self) -> frozenset[int]:
        """Return the special tokens that a template may put around images: not those that begin, end or fill a text."""
        tokenizer = self.tokenizer
        return frozenset(tokenizer.all_special_ids) - {
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        }

    @property
    def counts_pixels(self) -> bool:
        """Return whether the image processor bounds the number of an image's pixels, as Qwen's do."""
        kind = type(getattr(self.processor, "image_processor", None))
        return "max_pixels" in getattr(getattr(kind, "valid_kwargs", None), "__annotations__", {})

    def describe_images(self) -> dict[str, Any]:
        """Return which image processor prepares images, and the sizes that it makes of them."""
        images = getattr(self.processor, "image_processor", None)
        size = dict(getattr(images, "size", None) or {})
        known = {name: value for name, value in size.items() if value is not None}
        return {"image_processor": None if images is None else type(images).__name__, "size": known}

    def outline(self, sample: Sample) -> Outline:
        """Return the prompt before its images are written out."""
        text = self._write(sample)
        begins = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        encoded = self.tokenizer(text, add_special_tokens=not begins, return_offsets_mapping=fast)
        offsets = tuple((start, stop) for start, stop in encoded["offset_mapping"]) if fast else ()
        return Outline(text, tuple(encoded["input_ids"]), offsets)

    def count_question(self, sample: Sample) -> int:
        """Return how many tokens of the prompt are left once the context has ended: the question, and what the
        template adds.
        """
        ids, bare = self.outline(sample).ids, self.outline(replace(sample, question="")).ids
        return len(ids) - _count_shared(ids, bare)

    def count_frame(self, sample: Sample) -> int:
        """Return how many characters the template writes before the context."""
        empty = replace(sample, context=(), question="")
        return _count_shared(self._write(sample), self._write(empty))

    def _write(self, sample: Sample) -> str:
        text: str = self.processor.apply_chat_template(sample.messages(), tokenize=False, add_generation_prompt=True)
        return text


def _count_shared(first: Sequence[object], second: Sequence[object]) -> int:
    """Return with how many equal entries both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
