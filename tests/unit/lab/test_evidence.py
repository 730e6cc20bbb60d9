"""Where evidence stands: counted by hand, and refused where the prompt is not what its outline says."""

import pytest
from PIL import Image

from kvcomp.core.errors import InputError
from kvcomp.lab import Sample
from kvcomp.lab.codec import Codec
from kvcomp.lab.evidence import locate
from kvcomp.lab.tasks import Span
from kvcomp.minimile.processor import build_processor
from kvcomp.minimile.tasks import HARD_TASKS, TASKS
from kvcomp.minimile.vocabulary import IMAGE, TOKEN_IDS, VISION_END, VISION_START, encode

RED = Image.new("RGB", (56, 56), "red")
MARKED = [TOKEN_IDS[VISION_START], *[TOKEN_IDS[IMAGE]] * 4, TOKEN_IDS[VISION_END]]
CONTEXT = ("number of riga 4 0 7 1 .", "oslo", RED, "oslo", RED)


@pytest.fixture(scope="module")
def codec():
    return Codec(build_processor())


def prompt(codec, sample):
    ids = codec.encode([sample])["input_ids"][0].tolist()
    return ids, [token == TOKEN_IDS[IMAGE] for token in ids]


def found(codec, *evidence, context=CONTEXT):
    sample = Sample(context, "number of riga ?", "riga 4 0 7 1", evidence)
    return locate(codec, sample, *prompt(codec, sample))


def test_words_and_visual_tokens_are_counted_from_the_start_of_the_prompt(codec):
    # 0 <|im_start|>, 1 user, 2 number .. 9 ., 10 oslo, 11 start, 12 to 15, 16 end, 17 oslo, 18 start, 19 to 22, 23 end
    assert found(codec, Span(0)) == tuple(range(2, 10))
    assert found(codec, Span(0, 3, 7)) == (5, 6, 7, 8)
    assert found(codec, Span(2, 0, 4)) == (12, 13, 14, 15)
    assert found(codec, Span(4, 1, 3), Span(1)) == (10, 20, 21)
    assert found(codec, Span(3), Span(3)) == (17,)
    assert found(codec) == ()


def test_a_whole_image_comes_with_its_marks(codec):
    assert found(codec, Span(2)) == (11, 12, 13, 14, 15, 16)
    assert found(codec, Span(4)) == (18, 19, 20, 21, 22, 23)
    touching = ("oslo", RED, RED)  # 0 <|im_start|>, 1 user, 2 oslo, 3 to 8, 9 to 14
    assert found(codec, Span(1), context=touching) == (3, 4, 5, 6, 7, 8)
    assert found(codec, Span(2), context=touching) == (9, 10, 11, 12, 13, 14)


def test_what_begins_or_ends_a_text_is_no_mark_of_an_image(codec):
    special = {codec.tokenizer.pad_token_id, codec.tokenizer.eos_token_id}
    assert special <= set(codec.tokenizer.all_special_ids)
    assert not special & codec.marks


def test_a_word_of_the_frame_is_not_taken_for_the_context(codec):
    assert found(codec, Span(0), context=("user", "assistant")) == (2,)
    assert found(codec, Span(1), context=("user", "user")) == (3,)


def test_images_that_touch_share_their_run():
    class Unmarked(Codec):
        """Puts no marks around images, as some templates do."""

        def _write(self, sample):
            return super()._write(sample).replace("<|vision_start|>", "").replace("<|vision_end|>", "")

    codec = Unmarked(build_processor())
    sample = Sample(("oslo", RED, RED), "number ?", "oslo", (Span(2, 0, 2),))
    image = TOKEN_IDS[IMAGE]
    ids = [token for known in codec.outline(sample).ids for token in [known] * (4 if known == image else 1)]
    visual = [token == image for token in ids]
    assert locate(codec, sample, ids, visual) == (7, 8)  # <|im_start|> user oslo, four of the first, then the second
    with pytest.raises(InputError, match="begins at token 3 is not"):
        locate(codec, sample, ids[:3] + ids[4:], visual[:3] + visual[4:])


@pytest.mark.parametrize("task", [*TASKS, *HARD_TASKS], ids=lambda task: task.id)
def test_the_evidence_of_every_task_is_what_its_spans_say(codec, task):
    sample = task.sample("evidence", 3)
    ids, _ = prompt(codec, sample)
    expected = []
    for span in sample.evidence:
        part = sample.context[span.part]
        expected += encode(part) if isinstance(part, str) else MARKED
    assert [ids[place] for place in locate(codec, sample, *prompt(codec, sample))] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, visual: (ids[1:], visual[1:]), "begins at token 0 is not"),
        (lambda ids, visual: ([*ids[:17], 5, *ids[18:]], visual), "begins at token 16 is not"),
        (lambda ids, visual: (ids[:12] + ids[16:], visual[:12] + visual[16:]), "begins at token 12 is not"),
        (lambda ids, visual: ([*ids, 5], [*visual, False]), "and 1 more follow"),
    ],
)
def test_a_prompt_unlike_its_outline_is_refused(codec, change, message):
    sample = Sample(CONTEXT, "number ?", "riga", (Span(0),))
    with pytest.raises(InputError, match=message):
        locate(codec, sample, *change(*prompt(codec, sample)))


def test_a_part_that_the_template_does_not_write_is_refused():
    class Forgetful(Codec):
        """Writes another word for one of them."""

        def _write(self, sample):
            return super()._write(sample).replace("dallas", "lima")

    codec = Forgetful(build_processor())
    sample = Sample(("oslo  riga", "dallas"), "number ?", "riga", (Span(1),))
    ids = list(codec.outline(sample).ids)
    with pytest.raises(InputError, match="part 1 is missing"):
        locate(codec, sample, ids, [False] * len(ids))
