"""Build the processor: a word-level tokenizer, Qwen2-VL's image processor as PIL does it, a chat template."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PaddleOCRVLProcessor, PreTrainedTokenizerFast
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

from kvcomp.minimile.rendering import SIDE
from kvcomp.minimile.vocabulary import (
    IM_END,
    IMAGE,
    PAD,
    SPECIALS,
    TOKEN_IDS,
    UNKNOWN,
    VIDEO,
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ ' ' + part.text + ' ' }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
"""Qwen's frame without its system turn. The tokenizer drops white space, so a line break costs no token."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token for each word, each punctuation mark and each digit."""
    tokenizer = Tokenizer(models.WordLevel(dict(TOKEN_IDS), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    build: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerFast = build(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=IM_END,
        unk_token=UNKNOWN,
        additional_special_tokens=[token for token in SPECIALS if token not in (PAD, IM_END, UNKNOWN)],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        image_token=IMAGE,
        video_token=VIDEO,
    )
    return fast


def build_processor() -> PaddleOCRVLProcessor:
    """Return the processor that turns chat messages into the model's inputs.

    `Qwen2_5_VLProcessor` cannot be built without torchvision, because its video half needs it.
    `PaddleOCRVLProcessor` is the same processor without a video half: it takes Qwen2-VL's image processor and
    returns the same tensors.
    """
    pixels = SIDE * SIDE
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": pixels, "longest_edge": pixels})
    build: Any = PaddleOCRVLProcessor
    processor: PaddleOCRVLProcessor = build(images, build_tokenizer(), chat_template=CHAT_TEMPLATE)
    return processor
