"""The controls: what each keeps, and how they are found."""

from dataclasses import replace

import pytest
import torch

import kvcomp
from kvcomp.core.errors import ConfigError, IgnoredSettingWarning, InputError, UnknownNameError
from kvcomp.core.registry import registry
from kvcomp.lab.answers import answer
from kvcomp.lab.batches import QueryMode, make_batches
from kvcomp.lab.controls import CONTROLS, KeepEvidence, Method, NoContext, Oracle, find_method
from kvcomp.lab.tasks import Sample
from kvcomp.testing import make_sample, view_for

NAME = "sample {} of s".format


def kept(bed, method, samples):
    """Return the batch, and the positions that the first layer keeps for each row and KV head."""
    (batch,) = make_batches(bed, NAME, samples, len(samples), QueryMode.question_seen)
    indices = answer(batch, method.strategy_for(batch)).held.indices[0]
    return batch, [[[index for index in head.tolist() if index >= 0] for head in row] for row in indices]


def test_the_oracle_keeps_the_evidence_and_the_latest_tokens(bed, echo):
    samples = [echo().sample("s", number) for number in (0, 1, 2)]
    batch, rows = kept(bed, find_method("oracle", "8t"), samples)
    for row, heads in enumerate(rows):
        tokens, evidence = int(batch.inputs["attention_mask"][row].sum()), batch.evidence[row]
        assert heads == [[*evidence, *range(tokens - 8 + len(evidence), tokens)]] * 2


def test_recency_keeps_the_latest_tokens(bed, echo):
    batch, rows = kept(bed, find_method("recency", "8t"), [echo().sample("s", number) for number in (0, 1)])
    for row, heads in enumerate(rows):
        tokens = int(batch.inputs["attention_mask"][row].sum())
        assert heads == [list(range(tokens - 8, tokens))] * 2


def test_every_sample_draws_lots_of_its_own_whatever_its_batch(bed, echo):
    """Lots by position alone would be one draw for all samples, and no interval would know."""
    random, sample = find_method("random", "8t"), echo().sample("s", 0)
    (batch,) = make_batches(bed, NAME, [sample] * 6, 6, QueryMode.question_seen, range(6))
    together = answer(batch, random.strategy_for(batch)).held.indices[0]
    drawn = [[sorted(head.tolist()) for head in row] for row in together]
    assert all(drawn[one] != drawn[other] for one in range(6) for other in range(one))
    (alone,) = make_batches(bed, NAME, [sample], 1, QueryMode.question_seen, (4,))
    assert torch.equal(answer(alone, random.strategy_for(alone)).held.indices[0][0], together[4])
    (other,) = make_batches(bed, NAME, [sample], 1, QueryMode.question_seen, (4,))
    seeded = find_method("random", "8t", **{"scorer.seed": 1}).strategy_for(other)
    assert not torch.equal(answer(other, seeded).held.indices[0][0], together[4])


def test_an_oracle_that_is_told_nothing_is_refused(bed, echo):
    samples = [echo().sample("s", 0), replace(echo().sample("s", 1), evidence=())]
    with pytest.raises(InputError, match="and none is known of sample 1 of s; use another control"):
        kept(bed, find_method("oracle", "8t"), samples)


def test_evidence_beyond_the_budget_loses_its_first_tokens(bed, echo):
    batch, rows = kept(bed, find_method("oracle", "2t"), [echo().sample("s", 1)])
    assert rows == [[list(batch.evidence[0][-2:])] * 2]


@pytest.mark.parametrize("mode", list(QueryMode))
def test_without_images_all_else_stays_in_every_row(bed, echo, mode):
    (batch,) = make_batches(bed, NAME, [echo().sample("s", number) for number in (1, 5, 2)], 3, mode, (1, 5, 2))
    turns = "append" if mode is QueryMode.question_later else "recompress"
    layers = answer(batch, find_method("no-images", turns=turns).strategy_for(batch), mode=mode).held.indices
    for row, number in enumerate(batch.numbers):
        tokens = int(batch.inputs["attention_mask"][row].sum()) - batch.question_tokens
        images = {3 + 7 * image + place for image in range(3 + number % 2) for place in range(6)}
        for layer in layers:
            assert [index for index in layer[row, 0].tolist() if index >= 0] == sorted({*range(tokens)} - images)


def test_without_images_a_prompt_of_text_stays(bed):
    batch, rows = kept(bed, find_method("no-images"), [Sample(("number of lisbon 7 .",), "number of lisbon ?", "7")])
    assert rows == [[list(range(batch.inputs["input_ids"].shape[1]))] * 2]


def test_no_context_asks_the_question_alone(bed, echo):
    method, sample = find_method("no-context"), echo().sample("s", 1)
    asked = method.ask(sample)
    assert (asked.context, asked.question, asked.answer, asked.evidence) == ((), sample.question, sample.answer, ())
    assert bed.encode([asked])["input_ids"].shape[1] == 2 + 4 + 3
    assert method.strategy.selector is None


def test_evidence_is_protected_beside_what_the_scorer_protects():
    view = view_for(kvcomp.strategy("streaming-llm"), make_sample(seed=0, lengths=[9, 6]))
    scorer = kvcomp.strategy("streaming-llm", **{"scorer.sinks": 1}).scorer
    part = KeepEvidence(scorer=scorer, evidence=((3, 5), (4,)))
    slots = torch.tensor([5, 5])
    protected = [view.indices[row][part.protect(view, slots)[row]].unique().tolist() for row in range(2)]
    assert protected == [[0, 3, 5], [0, 4]]
    assert torch.equal(part.score(view, slots), scorer.score(view, slots))
    assert part.observations() == scorer.observations()


def test_recipes_come_before_controls_and_files_are_read(tmp_path):
    class Plugin:
        @kvcomp.hookimpl
        def kvcomp_recipes(self):
            return [{"name": "oracle", "budget": 0.3, "scorer": {"use": "random"}, "selector": "top-k"}]

    registry.register(Plugin(), "clever-plugin")
    try:
        assert type(find_method("oracle")) is Method
        assert find_method("oracle").strategy.scorer.use == "random"
    finally:
        registry.unregister("clever-plugin")
    assert isinstance(find_method("oracle"), Oracle)
    assert isinstance(find_method("no-context"), NoContext)
    file = tmp_path / "mine.yaml"
    file.write_text("scorer: {use: position, sinks: 2}\nselector: top-k\n")
    assert find_method(str(file), 0.5).strategy.name == "mine"
    assert find_method(file, 0.5, **{"scorer.sinks": 3}).strategy.scorer.sinks == 3


def test_faults_are_errors_with_near_misses():
    with pytest.raises(UnknownNameError, match=r"Did you mean 'oracle'.*no-context.*snapkv"):
        find_method("oracel")
    with pytest.raises(ConfigError, match=r"'position' has no field 'sink'. Did you mean 'sinks'"):
        find_method("oracle", **{"scorer.sink": 3})


@pytest.mark.parametrize("name", ["full", "no-context"])
def test_a_budget_that_is_ignored_warns(name):
    with pytest.warns(IgnoredSettingWarning, match=f"'{name}' has no selector, so it keeps everything"):
        find_method(name, 0.2)


@pytest.mark.parametrize("given", [{"budget": 0.2}, {"scorer": "random", "selector": "top-k"}])
def test_without_images_a_budget_or_a_choice_of_tokens_changes_nothing_and_warns(given):
    with pytest.warns(IgnoredSettingWarning, match="'no-images' keeps all but images, so it ignores a budget"):
        find_method("no-images", **given)


def test_every_control_can_be_built():
    assert [find_method(name).strategy.name for name in CONTROLS] == list(CONTROLS)
