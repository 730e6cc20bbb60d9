"""Build the processor: a word-level tokenizer, the Qwen2.5-VL image processor without torchvision, a chat template."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor
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
    return PreTrainedTokenizerFast(
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


def build_processor() -> Qwen2_5_VLProcessor:
    """Return the processor that turns chat messages into the model's inputs."""
    pixels = SIDE * SIDE
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": pixels, "longest_edge": pixels})
    return Qwen2_5_VLProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        video_processor=None,
        chat_template=CHAT_TEMPLATE,
    )
