"""The kit itself: every registered part and recipe passes, and parts that are broken on purpose are named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from generators import RECIPES, part_entries
from kvcomp_strategies.matchers.nearest import Nearest
from kvcomp_strategies.mergers.mean import Mean
from kvcomp_strategies.observations.received_attention import ReceivedSums
from kvcomp_strategies.policies.uniform import UniformPolicy
from kvcomp_strategies.scorers.position import Position
from kvcomp_strategies.selectors.top_k import TopK
from kvcomp_strategies.stores.dense import Dense, DenseStorage
from torch import Tensor

import kvcomp
from kvcomp import Assignment, LayerView, Pivots, Scores
from kvcomp.core.interfaces import Part
from kvcomp.core.registry import Entry
from kvcomp.testing import MODEL_PROMISES, PROMISES, ConformanceError, check
from kvcomp.testing.promises.parts import PART_PROMISES


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes(recipe: str) -> None:
    assert check(recipe, seeds=[0], without=MODEL_PROMISES) is None


@pytest.mark.parametrize("entry", [pytest.param(entry, id=f"{entry.kind}-{entry.name}") for entry in part_entries()])
def test_every_part_passes(entry: Entry) -> None:
    assert check(entry.value, seeds=[1], without=MODEL_PROMISES) is None


class Unsorted(TopK, use="unsorted"):
    """Pivots in score order."""

    def select(self, layer: LayerView, scores: Scores, slots: Tensor) -> Pivots:
        pivots = super().select(layer, scores, slots)
        length = pivots.filled().sum(dim=-1, keepdim=True)
        backwards = (length - 1 - torch.arange(pivots.indices.shape[-1])).clamp(min=0)
        return replace(pivots, indices=pivots.indices.gather(2, backwards).masked_fill(~pivots.filled(), 0))


class Repeating(TopK, use="repeating"):
    """The first pivot twice."""

    def select(self, layer: LayerView, scores: Scores, slots: Tensor) -> Pivots:
        pivots = super().select(layer, scores, slots)
        first = torch.cat([pivots.indices[..., :1], pivots.indices[..., :-1]], dim=-1)
        return replace(pivots, indices=first if pivots.indices.shape[-1] > 1 else pivots.indices)


class Greedy(TopK, use="greedy"):
    """One slot more than allotted."""

    def select(self, layer: LayerView, scores: Scores, slots: Tensor) -> Pivots:
        return super().select(layer, scores, (slots + 1).minimum(layer.valid.sum(dim=-1)))


class Blind(TopK, use="blind"):
    """Forgets what is protected."""

    def select(self, layer: LayerView, scores: Scores, slots: Tensor) -> Pivots:
        return super().select(layer, replace(scores, protected=torch.zeros_like(scores.protected)), slots)


class LaterTies(TopK, use="later-ties"):
    """Equal scores go to the later token."""

    def select(self, layer: LayerView, scores: Scores, slots: Tensor) -> Pivots:
        places = torch.arange(layer.shape[2], dtype=torch.float64) * 1e-12
        return super().select(layer, replace(scores, values=scores.values.double() + places), slots)


class Tierless(TopK, use="tierless"):
    """Goes by scores alone."""

    def select(self, layer: LayerView, scores: Scores, slots: Tensor) -> Pivots:
        return super().select(layer, replace(scores, tiers=None), slots)


class Coarse(TopK, use="coarse"):
    """Takes the earliest tokens, whatever their scores."""

    def select(self, layer: LayerView, scores: Scores, slots: Tensor) -> Pivots:
        return super().select(layer, replace(scores, values=torch.zeros_like(scores.values)), slots)


class Shrinking(Mean, use="shrinking"):
    """Merged slots are too short."""

    def merge(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
        keys, values, counts = super().merge(layer, pivots, assignment)
        short = torch.where(counts[..., None] > pivots.gather(layer.counts)[..., None], 0.5, 1.0)
        return keys * short, values * short, counts


class Uncounted(Mean, use="uncounted"):
    """A merged slot still counts as one."""

    def merge(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
        keys, values, _ = super().merge(layer, pivots, assignment)
        return keys, values, pivots.gather(layer.counts)


class KeysOnly(Mean, use="keys-only"):
    """Values stay behind."""

    def merge(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
        keys, _, counts = super().merge(layer, pivots, assignment)
        return keys, pivots.gather(layer.values), counts


class Restless(Mean, use="restless"):
    """Changes pivots that receive nothing."""

    def merge(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
        keys, values, counts = super().merge(layer, pivots, assignment)
        return keys * 1.001, values, counts


class Mutating(Position, use="mutating"):
    """Writes into the keys."""

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        layer.keys[..., 0] = 0.0
        return super().score(layer, slots)


class Dividing(Position, use="dividing"):
    """Divides by a norm that may be zero."""

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        return layer.keys.float().sum(dim=-1) / layer.keys.float().norm(dim=-1)


class Relative(Position, use="relative"):
    """Looks at the whole batch, so that the rest of it matters."""

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        norms = layer.keys.float().norm(dim=-1)
        return -(norms - norms.mean(dim=(0, 2), keepdim=True)).abs()


class Moody(Position, use="moody"):
    """Another choice every time."""

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        return torch.rand(layer.shape)


class MixedHeads(Position, use="mixed-heads"):
    """Lends each head the scores of the first."""

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        return layer.keys.float().norm(dim=-1)[:, :1].expand(layer.shape)


class Trespassing(Nearest, use="trespassing"):
    """Merges into protected pivots."""

    def match(self, layer: LayerView, pivots: Pivots, scores: Scores, rule: Tensor) -> Assignment:
        return super().match(layer, pivots, Scores(scores.values, torch.zeros_like(scores.protected)), rule)


class Lawless(Nearest, use="lawless"):
    """Ignores the rule of modalities."""

    def match(self, layer: LayerView, pivots: Pivots, scores: Scores, rule: Tensor) -> Assignment:
        return super().match(layer, pivots, scores, torch.zeros_like(rule))


class Heavy(Nearest, use="heavy"):
    """Weights that are no shares."""

    def match(self, layer: LayerView, pivots: Pivots, scores: Scores, rule: Tensor) -> Assignment:
        edges = super().match(layer, pivots, scores, rule)
        return replace(edges, weights=edges.weights * 2)


class Unlimited(UniformPolicy, use="unlimited"):
    """A rho above one."""

    def plan(self, layer: LayerView) -> kvcomp.LayerPlan:
        return replace(super().plan(layer), rho=torch.full((layer.shape[0],), 1.5))


class Forgetful(Dense, use="forgetful"):
    """Loses what is appended."""

    def open(self, reserve: int | None = None) -> DenseStorage:
        storage = super().open(reserve)
        storage.append = lambda keys, values: None  # type: ignore[method-assign]
        return storage


class LastBlock(ReceivedSums, use="last-block"):
    """Forgets all blocks but the last."""

    def update(self, state: Tensor | None, block: kvcomp.AttentionBlock) -> Tensor:
        return block.probs.sum(dim=2)


class Tall(kvcomp.BudgetAllocator, use="tall"):
    """Gives the first head everything."""

    def allocate(self, slots: Tensor, layers: object, scores: object) -> Tensor:
        _, kv_heads, _ = layers[0].shape  # type: ignore[index]
        return torch.stack([slots * 2, *[slots] * (kv_heads - 1)], dim=-1)[None]


BROKEN = {
    Unsorted: ("sorted-pivots", "ascending"),
    Repeating: ("sorted-pivots", "unique"),
    Greedy: ("exact-slots", "exactly the slots it was allotted"),
    Blind: ("protected-stay", "a protected token must stay"),
    LaterTies: ("earlier-ties", "the earlier token"),
    Tierless: ("higher-tiers", "one of a higher tier goes"),
    Coarse: ("earlier-ties", "one of a higher score goes"),
    Shrinking: ("convex-hull|equal-vectors", "between their members|merge to themselves"),
    Uncounted: ("counts", "must count its pivot's tokens"),
    KeysOnly: ("same-edges", "same edges as their keys"),
    Restless: ("all-kept|locked-pivots", "keys"),
    Mutating: ("unchanged-inputs", "keys of the view must not be changed"),
    Dividing: ("finite", "scores of valid tokens must be finite"),
    Relative: ("row-alone", "alone and in the batch"),
    Moody: ("same-bits", "of a second run|planned in one call"),
    MixedHeads: ("permuted-heads", "heads in another order"),
    Trespassing: ("locked-pivots", "into a protected pivot"),
    Lawless: ("modality-rules", "INTRA|HETERO"),
    Heavy: ("edges", "1 in sum"),
    Unlimited: ("legal-plan", r"rho must be in \[0, 1\]"),
    Forgetful: ("store", "were put in"),
    LastBlock: ("fold", "blocks of 1 rows"),
    Tall: ("exact-sum|exact-slots", "sum to the budget|no more than the request"),
}


@pytest.mark.parametrize("part", BROKEN, ids=lambda part: part.use)
def test_a_broken_part_is_named_with_its_promise(part: type) -> None:
    promise, seen = BROKEN[part]
    with pytest.raises(ConformanceError, match=seen) as caught:
        check(part, seeds=[0])
    assert caught.value.promise in promise.split("|")
    assert part.__name__ in str(caught.value)
    assert "see it again with seeds=[" in str(caught.value)


def test_a_crash_is_reported_as_one() -> None:
    class Crashing(Position, use="crashing"):
        """Fails on long prompts."""

        def score(self, layer: LayerView, slots: Tensor) -> Tensor:
            if layer.shape[2] > 100:
                raise RuntimeError("too long")
            return super().score(layer, slots)

    with pytest.raises(ConformanceError, match=r"raised RuntimeError: too long") as caught:
        check(Crashing)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_conformance_error_is_an_assertion() -> None:
    assert issubclass(ConformanceError, AssertionError)
    assert issubclass(ConformanceError, kvcomp.KVCompError)


class Freely(Coarse, use="freely"):
    """Takes the earliest tokens, and says that it does not go by score."""

    by_score = False


class ShorterByWord(Shrinking, use="shorter-by-word"):
    """Merged slots are too short, and the merger does not call them convex."""

    @property
    def convex(self) -> frozenset[str]:
        return frozenset()


@pytest.mark.parametrize("part", [Freely, ShorterByWord])
def test_what_a_part_does_not_say_of_itself_is_not_asked_of_it(part: type[Part]) -> None:
    assert check(part, seeds=[0], without=MODEL_PROMISES) is None


def test_a_promise_can_be_left_out() -> None:
    assert check(KeysOnly, seeds=[0], without=["same-edges", *MODEL_PROMISES]) is None


def test_no_two_promises_share_a_name() -> None:
    names = [*PROMISES, *PART_PROMISES, *MODEL_PROMISES]
    assert len(names) == len(set(names))


def test_an_unknown_promise_is_refused_with_a_near_miss() -> None:
    with pytest.raises(kvcomp.UnknownNameError, match="Did you mean 'convex-hull'"):
        check("h2o", without=["convex-hul"])


def test_an_instance_with_settings_can_be_checked() -> None:
    assert check(Position(sinks=2), seeds=[0], without=MODEL_PROMISES) is None


def test_a_mapping_can_be_checked() -> None:
    recipe = {"name": "mine", "budget": 0.3, "scorer": {"use": "position", "sinks": 1}, "selector": "top-k"}
    assert check(recipe, seeds=[0], without=MODEL_PROMISES) is None


def test_a_class_that_needs_arguments_says_which() -> None:
    class Needy(Position, use="needy"):
        """Needs a number."""

        depth: int

    with pytest.raises(kvcomp.InputError, match=r"gives depth; pass an instance"):
        check(Needy)
    assert check(Needy(depth=1), seeds=[0], without=MODEL_PROMISES) is None


def test_an_interface_is_no_part() -> None:
    with pytest.raises(kvcomp.InputError, match="implements its abstract method"):
        check(kvcomp.Scorer)


def test_the_example_of_a_broken_promise_is_small_and_makes_its_sample_again() -> None:
    with pytest.raises(ConformanceError) as caught:
        check(Greedy)
    call = str(caught.value).partition(" or make_sample")[2].partition(") breaks")[0]
    assert call == "(0, (2,), kv_heads=1, group=1"


def test_the_promises_of_generate_are_asked_of_a_part() -> None:
    class Leaking(Position, use="leaking"):
        """Scores by how often it was called: another answer every time."""

        def score(self, layer: LayerView, slots: Tensor) -> Tensor:
            CALLS.append(layer.layer)
            return super().score(layer, slots) * (-1) ** (len(CALLS) // 6)

    with pytest.raises(ConformanceError, match="tiny Llama") as caught:
        check(Leaking, seeds=[0], without=[*PROMISES, *PART_PROMISES])
    assert caught.value.promise in MODEL_PROMISES


CALLS: list[int] = []
