"""What lies in `examples/` beside the plugin: strategy files, and a task of one's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvcomp
from kvcomp.cli.testbeds import find_tasks
from kvcomp.core.registry import registry

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_strategy_file_is_a_strategy(path: Path) -> None:
    assert kvcomp.strategy(path).name == path.stem


@pytest.fixture
def phonebook() -> Iterator[Any]:
    """Register the task as its installed package would."""
    place = importlib.util.spec_from_file_location("kvcomp_phonebook", EXAMPLES / "own-task" / "kvcomp_phonebook.py")
    assert place is not None
    assert place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    registry.register(module, "phonebook")
    yield registry.find("task", "own/phonebook").value
    registry.unregister("phonebook")


def test_the_task_is_found_without_its_prefix(phonebook: Any) -> None:
    assert find_tasks("phonebook", "minimile-xs") == ([phonebook], [])


def test_samples_are_the_same_every_time_and_others_in_another_split(phonebook: Any) -> None:
    assert phonebook.sample("test", 3) == phonebook.sample("test", 3)
    assert phonebook.sample("test", 3) != phonebook.sample("eval-0", 3)


def test_the_evidence_holds_the_answer_and_only_that_is_right(phonebook: Any) -> None:
    sample = phonebook.sample("test", 0)
    name, number = sample.answer.split(maxsplit=1)
    (span,) = sample.evidence
    assert sample.context[span.part] == f"The number of {name} is {number}."
    assert phonebook.score(sample.answer, sample) == 1.0
    assert phonebook.score(name, sample) == 0.0
