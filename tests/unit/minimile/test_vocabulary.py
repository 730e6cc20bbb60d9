import pytest

from kvcomp.minimile.processor import build_tokenizer
from kvcomp.minimile.vocabulary import IM_END, SPECIALS, TOKEN_IDS, WORDS, encode


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_words_are_distinct_and_about_two_hundred():
    assert len(set(WORDS)) == len(WORDS) == len(TOKEN_IDS)
    assert 200 <= len(WORDS) <= 320


def test_the_tokenizer_and_encode_agree_on_every_word(tokenizer):
    text = " ".join(WORDS)
    assert tokenizer(text).input_ids == encode(text) == list(range(len(WORDS)))
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_are_one_token_each_and_punctuation_needs_no_space(tokenizer):
    assert tokenizer("answer: 4071?").input_ids == encode("answer : 4 0 7 1 ?")


def test_decoding_an_answer_drops_the_end_mark(tokenizer):
    ids = tokenizer(f"answer : 4 0 7 1 {IM_END}").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "answer : 4 0 7 1"


def test_special_tokens_are_special(tokenizer):
    assert set(SPECIALS) == set(tokenizer.all_special_tokens)
    assert tokenizer.eos_token == IM_END
