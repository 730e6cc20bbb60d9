"""The file of an ablation: models, tasks, strategies and a grid. Every fault is found before a model is loaded."""

from __future__ import annotations

import difflib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kvcomp.core.config import PART_KEYS, load_document
from kvcomp.core.errors import ConfigError, IgnoredSettingWarning, KVCompError, suggest
from kvcomp.core.making import BOUNDS
from kvcomp.lab.batches import QueryMode
from kvcomp.lab.compare import budget_of
from kvcomp.lab.controls import Method, find_method
from kvcomp.lab.milebench.source import TaskFolder

BUDGET = "budget"


def _listed(value: Any) -> Any:
    """Return a list; one thing alone is a list of one."""
    return value if isinstance(value, list) or value is None else [value]


class Section(BaseModel):
    """A part of the file. Unknown keys are faults."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelSpec(Section):
    """A model that takes more than its name.

    Attributes:
        model: folder, or the name of a testbed.
        name: how results call it; by default the name of its folder. Two models need two names.
        device: where it runs.
        dtype: of its weights.
        device_map: lets `accelerate` place its layers on several devices.
        min_pixels, max_pixels: limits of an image; by default the checkpoint's.
        batch: samples answered together; by default that of the command.
    """

    model: str
    name: str | None = Field(default=None, min_length=1)
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    device_map: str | None = None
    min_pixels: int | None = Field(default=None, ge=1)
    max_pixels: int | None = Field(default=None, ge=1)
    batch: int | None = Field(default=None, ge=1)


class AblationFile(Section):
    """What is compared: every strategy, at every point of the grid, on every task, with every model.

    Attributes:
        models: folders, names of testbeds, or either with how it is loaded.
        tasks: names, `all` for those that the model was trained for, or folders in MileBench's format, as
            `milebench:FOLDER#TASK,TASK` or with their context policy; see `TaskFolder`.
        samples: of each task, or all that it has if there are fewer.
        seed: of the samples; several are several sets of samples.
        strategies: names, files, or mappings (`{base: flowmm, name: mine, set: {matcher: {use: nearest}}}`).
        grid: values by path; `budget`, or a field of a part such as `policy.threshold`, which changes those strategies
            that have it.
        query_modes: whether the question is compressed with the context, or comes later.
        max_new_tokens: length of an answer at most; by default what each task allows.
        metrics: `all` also measures likelihood, divergence from the full cache, and evidence retention.
        note: what a reader should know, shown in reports.
    """

    models: Annotated[list[str | ModelSpec], BeforeValidator(_listed), Field(min_length=1)]
    tasks: Annotated[list[str | TaskFolder], BeforeValidator(_listed), Field(min_length=1)]
    samples: int = Field(ge=1)
    seed: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_listed), Field(min_length=1)] = [0]
    strategies: Annotated[list[str | dict[str, Any]], BeforeValidator(_listed), Field(min_length=1)]
    grid: dict[str, Annotated[list[Any], BeforeValidator(_listed), Field(min_length=1)]] = {}
    query_modes: Annotated[
        list[Literal["question_seen", "question_later"]], BeforeValidator(_listed), Field(min_length=1)
    ] = ["question_seen"]
    max_new_tokens: int | None = Field(default=None, ge=1)
    metrics: Literal["plain", "all"] = "plain"
    note: str = ""

    @property
    def modes(self) -> list[QueryMode]:
        """Return the query modes, each once."""
        return [QueryMode(mode) for mode in dict.fromkeys(self.query_modes)]


@dataclass(frozen=True)
class Variant:
    """A method at one point of the grid.

    Attributes:
        name: of the strategy.
        settings: what the grid changed of it, by path, the budget left out.
        method: what answers.
    """

    name: str
    settings: Mapping[str, Any]
    method: Method

    @property
    def budget(self) -> float | str:
        """Return the budget as tables show it, 1.0 where it is ignored."""
        strategy = self.method.strategy
        if strategy.ignores_budget:
            return 1.0
        return budget_of(strategy)


SECTIONS = {section.__name__: section for section in (ModelSpec, TaskFolder)}
TYPES = ("str", *SECTIONS)  # how pydantic names the members of a union in a path


def read_file(path: Path) -> AblationFile:
    """Return what a YAML file asks for; names in it are not looked up.

    Raises:
        ConfigError: listing every fault with its path.
        InputError: it cannot be read, or is not YAML.
    """
    return parse_document(load_document(path), str(path))


def parse_document(document: Mapping[str, Any], source: str) -> AblationFile:
    """Return what a document asks for.

    Raises:
        ConfigError: listing every fault with its path.
    """
    try:
        return AblationFile.model_validate(dict(document))
    except ValidationError as error:
        raise ConfigError(sorted(set(map(_describe, error.errors()))), source) from None


def make_variants(file: AblationFile, folder: Path, faults: list[str]) -> list[Variant]:
    """Return every strategy at every point of the grid that changes it, each once.

    Args:
        file: what is asked for.
        folder: that files of strategies are looked for in.
        faults: where faults are added: names, fields and values that do not exist or cannot be.
    """
    found: dict[Any, Variant] = {}
    bases = [
        (f"strategies[{place}]", _source(source, folder), _try(faults, f"strategies[{place}]", _source(source, folder)))
        for place, source in enumerate(file.strategies)
    ]
    methods = [method for _, _, method in bases if method is not None]
    _check_names(methods, faults)
    if len(methods) == len(bases):
        _check_grid(file.grid, methods, faults)
    for path, source, method in bases:
        if method is None:
            continue
        for point in _points(file.grid, method):
            changed = {name: value for name, (_, value) in point.items()}
            where = " ".join([path, *(f"grid.{name}[{place}]" for name, (place, _) in point.items())])
            made = method if not changed else _try(faults, where, source, changed)
            if made is not None:
                settings = {name: value for name, value in changed.items() if name != BUDGET}
                found.setdefault((method.strategy.name, _identity(made)), Variant(method.strategy.name, settings, made))
    return list(found.values())


def _identity(method: Method) -> str:
    budget = "" if method.strategy.ignores_budget else str(method.strategy.budget)
    return f"{type(method).__name__} {budget} { ({**method.strategy.dump(), 'budget': None, 'name': None})!r}"


def _source(source: str | dict[str, Any], folder: Path) -> str | dict[str, Any]:
    """Return a strategy's source, a file beside the ablation's own found there."""
    if isinstance(source, str) and source.endswith((".yaml", ".yml")) and (folder / source).exists():
        return str(folder / source)
    return source


def _try(
    faults: list[str], path: str, source: str | dict[str, Any], changed: Mapping[str, Any] | None = None
) -> Method | None:
    """Return the method, None where it cannot be built, and the faults then say why."""
    overrides = dict(changed or {})
    budget = overrides.pop(BUDGET, None)
    build: Callable[[], Method] = lambda: find_method(source, budget, **overrides)  # noqa: E731
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IgnoredSettingWarning)  # it is one configuration, and the plan says so
            return build()
    except ConfigError as error:
        faults += [f"{path}: {fault}" for fault in error.faults]
    except KVCompError as error:
        faults.append(f"{path}: {error}")
    return None


def _check_names(methods: Sequence[Method], faults: list[str]) -> None:
    names = [method.strategy.name for method in methods]
    faults += [
        f"strategies: {names.count(name)} of them are named {name!r}; give each a `name` of its own"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]


def _check_grid(grid: Mapping[str, Sequence[Any]], methods: Sequence[Method], faults: list[str]) -> None:
    """Find paths that no strategy has, and budgets that cannot be read."""
    documents = [method.strategy.dump() for method in methods]
    for path in grid:
        if path == "name":
            faults.append("grid.name: a grid changes fields, and a name is none; name strategies under `strategies`")
        elif path != BUDGET and not any(_has(document, path) for document in documents):
            known = sorted({name for document in documents for name in _paths(document)})
            near = difflib.get_close_matches(path, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else suggest(path.partition(".")[0], PART_KEYS)
            faults.append(f"grid.{path}: no strategy of this file has such a field. {hint}")


def _has(document: Mapping[str, Any], path: str) -> bool:
    if "." not in path:
        return path in (*PART_KEYS, *document)
    return path in _paths(document)


def _paths(document: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every field."""
    for key, value in document.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


def _points(grid: Mapping[str, Sequence[Any]], method: Method) -> Iterator[dict[str, tuple[int, Any]]]:
    """Yield the points of the grid that can change a method: each path with the place of its value, and the value."""
    document = method.strategy.dump()
    own = {
        path: list(enumerate(values))
        for path, values in grid.items()
        if (not method.strategy.ignores_budget if path == BUDGET else _has(document, path))
    }
    for values in itertools.product(*own.values()):
        yield dict(zip(own, values, strict=True))


def _describe(fault: Mapping[str, Any]) -> str:
    """Return a fault of pydantic in our words, with its path in the file."""
    place = [part for part in fault["loc"] if part not in TYPES and not str(part).startswith(("dict[", "list["))]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if fault["type"] == "extra_forbidden":
        section = next((SECTIONS[part] for part in fault["loc"] if part in SECTIONS), AblationFile)
        if place in ([BUDGET], [f"{BUDGET}s"]):
            return f"{path}: no such key; budgets are part of the grid, as `grid: {{budget: [0.1, 0.2]}}`"
        return f"{path}: no such key. {suggest(str(place[-1]), section.model_fields)}"
    if fault["type"] == "missing":
        return f"{path}: must be given"
    if fault["type"] in BOUNDS:
        return f"{path}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r}"
    return f"{path}: {fault['msg'].replace('Input should', 'must')}, got {fault['input']!r}"


def in_mode(method: Method, mode: QueryMode) -> Method:
    """Return the method as it is used in a query mode: what follows a context is not compressed."""
    if mode is QueryMode.question_seen:
        return method
    return replace(method, strategy=replace(method.strategy, turns="append"))
