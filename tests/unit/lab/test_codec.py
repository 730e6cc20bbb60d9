"""What a processor says of a prompt before it is encoded."""

import pytest
import torch

from kvcomp.core.errors import InputError
from kvcomp.lab import Sample
from kvcomp.lab.codec import Codec
from kvcomp.minimile.processor import build_processor
from kvcomp.minimile.vocabulary import encode


@pytest.fixture(scope="module")
def codec():
    return Codec(build_processor())


def test_the_question_is_what_follows_the_context(codec):
    sample = Sample(("oslo red", "riga blue"), "number of riga ?", "riga 4")
    after = encode("number of riga ? <|im_end|> <|im_start|> assistant")
    assert codec.count_question(sample) == len(after) == 7
    assert codec.encode([sample])["input_ids"][0, -7:].tolist() == after


def test_the_frame_ends_where_the_context_begins(codec):
    sample = Sample(("user", "riga blue"), "number of riga ?", "riga 4")
    frame = codec.count_frame(sample)
    assert codec.outline(sample).text[frame:].split()[:2] == ["user", "riga"]


def test_an_outline_knows_the_characters_of_each_token(codec):
    outline = codec.outline(Sample(("oslo red",), "number ?", "riga 4"))
    words = [outline.text[start:stop] for start, stop in outline.offsets]
    assert list(outline.ids) == encode(" ".join(words))


def test_answers_have_no_mark_at_their_end(codec):
    sample = Sample((), "", "riga 4 0")
    assert codec.encode_answer(sample) == encode("riga 4 0")
    assert codec.decode(torch.tensor([[*codec.encode_answer(sample), *encode("<|im_end|>")]])) == ["riga 4 0"]


def test_a_processor_without_a_chat_template_is_refused():
    processor = build_processor()
    processor.chat_template = None
    with pytest.raises(InputError, match="must have a chat template"):
        Codec(processor)
