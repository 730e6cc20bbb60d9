"""The envelope: a few recipes keep every promise, engines that break one are red; `slow` runs everything."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from generators import RECIPES
from torch import Tensor
from transformers import DynamicCache

import kvcomp
from kvcomp.testing.envelope import (
    FEATURES,
    Cell,
    Engine,
    Envelope,
    KVCompEngine,
    NotClaimedError,
    Verdict,
    features_named,
    run_envelope,
)
from kvcomp.testing.envelope.tables import reasons, tables
from kvcomp.testing.families import FAMILIES

COMPILED = "flex-attention"  # torch compiles it for a minute, so it is tried in the slow tests alone


def cells(engine: Engine, family: str, *features: str) -> dict[str, Cell]:
    found = run_envelope([engine], [FAMILIES[family]], features_named(features or None)).cells
    return {cell.feature: cell for cell in found}


@pytest.mark.parametrize(("recipe", "family"), [("flowmm", "qwen2.5-vl"), ("pyramidkv", "llama")])
def test_every_feature_is_green_or_says_why_not(recipe: str, family: str) -> None:
    found = cells(KVCompEngine(recipe), family, *[name for name in FEATURES if name != COMPILED])
    assert len(found) == len(FEATURES) - 1
    assert [cell for cell in found.values() if cell.verdict is Verdict.RED] == []
    dashes = {name: cell.reason for name, cell in found.items() if cell.verdict is Verdict.DASH}
    assert dashes.keys() <= {"flash-attention-2", "new-media"}
    assert all(dashes.values())


LATER_IMAGES = ("qwen2.5-vl", "qwen2.5-omni", "llava-1.5", "internvl", "idefics3", "ovis2")


@pytest.mark.parametrize("family", LATER_IMAGES)
def test_a_later_turn_may_have_images_of_its_own(family: str) -> None:
    assert cells(KVCompEngine("snapkv"), family, "new-media")["new-media"].verdict is Verdict.GREEN


@pytest.mark.parametrize(
    ("family", "given"),
    [("llava-next", "image_sizes"), ("gemma3", "token_type_ids"), ("molmo2", "image_grids, image_token_pooling")],
)
def test_later_images_are_refused_where_more_than_pixels_belongs_to_them(family: str, given: str) -> None:
    cell = cells(KVCompEngine("snapkv"), family, "new-media")["new-media"]
    assert cell.verdict is Verdict.DASH
    assert f"got also {given};" in cell.reason


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_feature_of_any_recipe_is_red(recipe: str, family: str) -> None:
    found = cells(KVCompEngine(recipe), family)
    assert [cell for cell in found.values() if cell.verdict is Verdict.RED] == []


class Keeping(Engine):
    """Compresses nothing, with transformers' own cache; what is asked of it beside that it ignores."""

    name = "keeping"

    @contextmanager
    def compressing(self, model: Any, ratio: float, **options: Any) -> Iterator[Any]:
        yield DynamicCache(config=model.config)

    def kept_bytes(self, cache: Any) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


class Cutting(Keeping):
    """Drops the first half of every layer after each prompt, and its positions with it, as a naive eviction does."""

    name = "cutting"

    @contextmanager
    def compressing(self, model: Any, ratio: float, **options: Any) -> Iterator[Any]:
        if options:
            raise NotClaimedError(f"no {', '.join(options)}")
        handle = model.register_forward_hook(self._cut, with_kwargs=True)
        try:
            yield DynamicCache(config=model.config)
        finally:
            handle.remove()

    def _cut(self, module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if kwargs["input_ids"].shape[1] > 1:
            for layer in output.past_key_values.layers:
                half = layer.keys.shape[2] * 6 // 10
                layer.keys, layer.values = layer.keys[:, :, half:], layer.values[:, :, half:]


class Leaving(Keeping):
    """Leaves an attribute on the model."""

    name = "leaving"

    @contextmanager
    def compressing(self, model: Any, ratio: float, **options: Any) -> Iterator[Any]:
        model.model.layers[0].self_attn.seen_by = self.name
        yield DynamicCache(config=model.config)


def test_an_engine_that_keeps_everything_is_red_in_bytes_alone() -> None:
    found = cells(Keeping(), "llama", "full-budget", "padded-batch", "beams", "second-turn", "bytes", "later-budget")
    assert {name for name, cell in found.items() if cell.verdict is Verdict.RED} == {"bytes", "later-budget"}
    assert "may hold" in found["bytes"].reason


def test_a_naive_eviction_is_red_where_batches_and_turns_break() -> None:
    found = cells(Cutting(), "llama", "full-budget", "padded-batch", "later-budget", "long-query", "model-restored")
    red = {name for name, cell in found.items() if cell.verdict is Verdict.RED}
    assert red == {"full-budget", "padded-batch", "later-budget"}
    assert found["long-query"].reason == "no turns"
    assert found["model-restored"].verdict is Verdict.GREEN


def test_what_is_left_on_a_model_is_named() -> None:
    found = cells(Leaving(), "llama", "model-restored")
    assert found["model-restored"].verdict is Verdict.RED
    assert "model.layers.0.self_attn" in found["model-restored"].reason


def test_what_another_request_left_on_a_model_with_mrope_does_not_matter() -> None:
    found = cells(KVCompEngine("flowmm"), "qwen2.5-vl", "full-budget", "crop", "full-budget", "long-query")
    assert {cell.verdict for cell in found.values()} == {Verdict.GREEN}


def test_a_broken_promise_is_red_also_where_a_library_refuses_by_assertions() -> None:
    class Asserting(Keeping):
        refusals = (AssertionError,)

    (cell,) = cells(Asserting(), "llama", "bytes").values()
    assert cell.verdict is Verdict.RED


def test_an_engine_that_hooks_the_model_is_measured_against_the_whole_cache() -> None:
    (cell,) = cells(Cutting(), "llama", "bytes").values()
    assert "may hold 13787 bytes" in cell.reason  # of all 44 tokens, not of what the hook left


def test_what_is_not_claimed_is_a_dash_with_its_reason() -> None:
    found = cells(Keeping(), "llama", "threads", "many-questions", "save-and-load")
    assert {cell.verdict for cell in found.values()} == {Verdict.DASH}
    assert found["many-questions"].reason == "no snapshots of a compressed cache"


def test_a_method_that_cannot_hold_a_prompt_has_no_green_cell() -> None:
    class Failing(Keeping):
        def least(self, ratio: float, model: Any, prompt: Mapping[str, Tensor]) -> float:
            raise ZeroDivisionError("no heads")

    (cell,) = cells(Failing(), "llama", "bytes").values()
    assert (cell.verdict, cell.reason) == (Verdict.RED, "a prompt raised ZeroDivisionError: no heads")


def test_an_unknown_feature_is_refused_with_a_near_miss() -> None:
    with pytest.raises(kvcomp.UnknownNameError, match="Did you mean 'padded-batch'"):
        features_named(["padded-bach"])


def made(*verdicts: tuple[str, str, str, Verdict]) -> Envelope:
    return Envelope(tuple(Cell(*names, verdict, verdict.value) for *names, verdict in verdicts), {"torch": "2"})


def test_an_envelope_comes_back_from_its_document() -> None:
    envelope = run_envelope([KVCompEngine("snapkv")], [FAMILIES["llama"]], features_named(["bytes", "new-media"]))
    again = Envelope.load(json.loads(json.dumps(envelope.dump())))
    assert again.dump() == envelope.dump()
    assert [cell.verdict for cell in again.cells] == [Verdict.GREEN, Verdict.DASH]


def test_tables_have_features_down_and_the_longer_axis_in_groups() -> None:
    one = made(("a", "x", "bytes", Verdict.GREEN), ("a", "y", "bytes", Verdict.RED))
    assert list(tables(one, 9)) == [("a", ["feature", "x", "y"], [["bytes", "ok", "RED"]])]
    many = made(*[(method, "x", "bytes", Verdict.DASH) for method in "abc"])
    assert [head for _, head, _ in tables(many, 2)] == [["feature", "a", "b"], ["feature", "c"]]


def test_reasons_that_are_the_same_are_said_once() -> None:
    envelope = made(*[(method, "x", "bytes", Verdict.RED) for method in "ab"], ("a", "y", "bytes", Verdict.RED))
    assert reasons(envelope, Verdict.RED) == [("bytes", "x: every method; y: a", "red")]


def test_the_models_are_the_same_every_time_and_leave_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    one, other = FAMILIES["qwen2.5-vl"].model(), FAMILIES["qwen2.5-vl"].model()
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, one.parameters(), other.parameters()))
