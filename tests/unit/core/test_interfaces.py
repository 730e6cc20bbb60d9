"""Interfaces: one abstract method each, and a part that is incomplete fails when it is built."""

import inspect

import pytest
import torch
from kvcomp_strategies.mergers.mean import Mean
from kvcomp_strategies.mergers.unrotated import Unrotated
from kvcomp_strategies.mergers.values_only import ValuesOnly
from kvcomp_strategies.scorers.position import Position
from kvcomp_strategies.scorers.received_attention import ReceivedAttention
from pydantic import ValidationError

import kvcomp
from kvcomp.core.interfaces import PART_KINDS, Part


@pytest.mark.parametrize("kind", PART_KINDS)
def test_an_interface_has_one_abstract_method(kind: str) -> None:
    interface = PART_KINDS[kind]
    assert len(interface.__abstractmethods__) == 1
    assert interface.kind == kind
    with pytest.raises(TypeError, match="abstract"):
        interface()


def test_the_kinds_are_those_of_the_command_line() -> None:
    kinds = ["policy", "allocator", "scorer", "selector", "matcher", "merger", "store", "observation"]
    assert list(PART_KINDS) == kinds


def test_a_part_is_frozen_compares_by_value_and_can_be_a_key() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Position().sinks = 3  # type: ignore[misc]
    assert Position(sinks=2) == Position(sinks=2) != Position()
    assert len({Position(), Position(), Position(sinks=2)}) == 2


def test_a_part_refuses_unknown_fields_and_does_not_convert() -> None:
    with pytest.raises(ValidationError, match="extra"):
        Position(sink=3)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="integer"):
        Position(sinks=True)


def test_a_part_dumps_its_name_and_fields() -> None:
    assert Position(sinks=2).dump() == {"use": "position", "sinks": 2, "start": 0.0}


def test_a_subclass_without_a_name_keeps_its_parents() -> None:
    class Variant(Position):
        """The same under the same name."""

    assert Variant.use == "position"
    assert Variant.kind == "scorer"


def test_a_part_observes_and_protects_nothing_by_default() -> None:
    view = torch.zeros(1)
    assert Position().observations() == ()
    assert kvcomp.Scorer.protect(Position(), view, view) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", PART_KINDS)
def test_every_method_of_an_interface_says_what_it_returns(kind: str) -> None:
    for name, method in inspect.getmembers(PART_KINDS[kind], inspect.isfunction):
        if method.__module__ == Part.__module__ and not name.startswith("_"):
            assert (method.__doc__ or "").startswith(("Return", "Hold", "Add")), name


def test_a_part_knows_the_parts_inside_it() -> None:
    deep = ValuesOnly(merger=Unrotated(merger=Mean()))
    assert [part.use for part in deep.family()] == ["values-only", "unrotated", "mean"]
    assert deep.inner_parts() == (Unrotated(merger=Mean()),)
    assert ValuesOnly.part_fields() == {"merger": kvcomp.Merger}
    assert deep.gives() == {"merging"}
    inside = {"use": "unrotated", "merger": {"use": "mean"}}
    assert deep.dump() == {"use": "values-only", "merger": inside}


def test_a_part_observes_what_the_parts_inside_it_observe() -> None:
    class Holder(kvcomp.Scorer, use="holder"):
        """Holds a scorer."""

        scorer: kvcomp.Scorer

        def score(self, layer: kvcomp.LayerView, slots: torch.Tensor) -> torch.Tensor:
            return self.scorer.score(layer, slots)

    assert Holder(scorer=ReceivedAttention()).observations() == ReceivedAttention().observations()
    assert Holder(scorer=Position()).observations() == ()
    with pytest.raises(ValidationError, match="instance of Scorer"):
        Holder(scorer=Mean())  # type: ignore[arg-type]
