"""Does MiniMile tell methods apart? Exact match of every task against the budget, and the controls that say what a
task measures at all.

    python benchmarks/ruler.py measure --out benchmark-output/ruler.jsonl --samples 60
    python benchmarks/ruler.py tables benchmark-output/ruler.jsonl

    python benchmarks/ruler.py measure --out benchmark-output/recipes.jsonl --samples 40 --methods all --budgets 0.2 0.1
    python benchmarks/ruler.py recipes benchmark-output/recipes.jsonl
    python benchmarks/ruler.py models benchmark-output/recipes.jsonl benchmark-output/recipes-seed1.jsonl

`measure` asks the tasks that the model has learned. It goes on where an earlier run stopped; several may share the
work, each with tasks and a file of its own. `recipes` is one table of all methods, the tasks together; `models` is
such a table over several testbeds, a file for each.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvcomp.core.errors import BudgetError
from kvcomp.core.registry import registry
from kvcomp.lab.batches import QueryMode
from kvcomp.lab.controls import Method, find_method
from kvcomp.lab.evaluation import Evaluation, TaskResult
from kvcomp.lab.statistics import mean, wilson
from kvcomp.lab.tasks import Task
from kvcomp.lab.testbed import LoadedTestbed, load_testbed

BUDGETS = (0.05, 0.1, 0.2, 0.4, 0.6)
METHODS = ("random", "recency", "streaming-llm", "h2o", "snapkv", "flowmm", "kvzip", "kvcomp-global", "oracle")
CONTROLS = {
    ("full", "1.0"): "full",
    ("no-context", "1.0"): "no context",
    ("recency", "1t"): "1 slot",
    ("recency", "32t"): "last 32 slots",
    ("no-visual-tokens", "text"): "without visual tokens",
    ("no-images", "text"): "without images",
    ("random", "0.2"): "random at 20%",
}
NO_VISUAL_TOKENS: dict[str, Any] = {
    "name": "no-visual-tokens",
    "scorer": {"use": "text-first", "scorer": "position"},
    "selector": {"use": "top-k", "overflow": True},
}
"""Keeps all text and, at a budget of one token, nothing else: the marks around images too, which `no-images` leaves
out."""


@dataclass(frozen=True)
class Cell:
    """One number of the table: a task under a method at a budget."""

    task: str
    mode: str
    method: str
    budget: str


def cells(tasks: Sequence[str], methods: Sequence[str], budgets: Sequence[float]) -> Iterator[Cell]:
    """Yield what is to be measured, the controls first."""
    modes = [mode.value for mode in QueryMode]
    for task in tasks:
        for mode in modes:
            yield Cell(task, mode, "full", "1.0")
            yield from (Cell(task, mode, method, "text") for method in ("no-visual-tokens", "no-images"))
        yield Cell(task, modes[0], "no-context", "1.0")
        yield Cell(task, modes[0], "recency", "1t")
        yield Cell(task, modes[0], "recency", "32t")
    for budget in budgets:
        for task in tasks:
            for mode in modes:
                yield from (Cell(task, mode, method, str(budget)) for method in methods)


def measure(bed: LoadedTestbed, planned: Iterable[Cell], samples: int, seed: int, out: Path) -> None:
    """Append one line to `out` for every cell that it does not hold yet."""
    known = {entry.value.id: entry.value for entry in registry.entries("task") if entry.name.startswith("mini/")}
    done = {Cell(*(row[name] for name in ("task", "mode", "method", "budget"))) for row in read([out])}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file, torch.inference_mode():
        for cell in planned:
            if cell not in done:
                row = asdict(cell) | measured(bed, known[cell.task], cell, samples, f"eval-{seed}")
                file.write(json.dumps(row) + "\n")
                file.flush()


def measured(bed: LoadedTestbed, task: Task, cell: Cell, samples: int, split: str) -> dict[str, Any]:
    """Return what a cell gave, or the smallest budget that its method takes."""
    evaluation = Evaluation(
        bed,
        found(cell),
        samples=samples,
        split=split,
        mode=QueryMode(cell.mode),
        batch=30,
    )
    try:
        outcomes = list(evaluation.outcomes(task))
    except BudgetError as error:
        return {"smallest": error.smallest}
    result = TaskResult.of(task, outcomes)
    return {
        "samples": result.samples,
        "exact_match": round(result.exact_match, 4),
        "ci": [round(bound, 4) for bound in result.ci],
        "kv_bytes": round(result.kv_bytes),
        "rho": [mean(layer) for layer in zip(*(seen.rho for seen in outcomes), strict=True)],
    }


def found(cell: Cell) -> Method:
    """Return the method of a cell at its budget."""
    if cell.budget == "text":
        return find_method(NO_VISUAL_TOKENS, "1t") if cell.method == "no-visual-tokens" else find_method(cell.method)
    budget = {"tokens": int(cell.budget[:-1])} if cell.budget.endswith("t") else float(cell.budget)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return find_method(cell.method, budget)


def testbed_folder(model: str) -> Path:
    """Return the folder of a testbed by its name, or the folder itself."""
    return Path(model) if Path(model).is_dir() else Path(registry.find("testbed", model).value)


def read(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the rows of these files."""
    return [json.loads(line) for path in files if path.exists() for line in path.read_text().splitlines()]


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield Markdown: the controls, then for each mode and task the methods against the budgets."""
    found = {Cell(row["task"], row["mode"], row["method"], row["budget"]): row for row in rows}
    tasks, modes = list(dict.fromkeys(row["task"] for row in rows)), [mode.value for mode in QueryMode]
    yield f"| task | {' | '.join(CONTROLS.values())} |"
    yield "|---" * (len(CONTROLS) + 1) + "|"
    for task in tasks:
        body = [shown(found.get(Cell(task, modes[0], *control))) for control in CONTROLS]
        yield f"| `{task}` | {' | '.join(body)} |"
    shares = sorted({cell.budget for cell in found if cell.budget[:2] == "0."}, key=float)
    methods = list(dict.fromkeys(cell.method for cell in found if cell.budget in shares))
    yield "\nrho of each layer:\n"
    for task in tasks:
        row = found.get(Cell(task, modes[0], "flowmm", max(shares, key=float, default="")), {})
        yield f"- `{task}`: {', '.join(f'{rho:.2f}' for rho in row.get('rho', ()))}"
    for mode in modes:
        for task in tasks:
            yield f"\n`{task}`, {mode.replace('_', ' ')}:\n"
            yield f"| method | {' | '.join(f'{float(budget):.0%}' for budget in shares)} |"
            yield "|---" * (len(shares) + 1) + "|"
            for method in methods:
                body = [shown(found.get(Cell(task, mode, method, budget))) for budget in shares]
                yield f"| `{method}` | {' | '.join(body)} |"


def recipes(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield one Markdown table: all methods at all budgets in both modes, the tasks together."""
    modes = [mode.value for mode in QueryMode]
    methods, budgets = shared([rows], "method"), shared([rows], "budget")
    columns = [(mode, budget) for mode in modes for budget in budgets]
    yield from head(columns)
    for method in methods:
        body = [shown(pooled(chosen(rows, mode, method, budget))) for mode, budget in columns]
        yield f"| `{method}` | {' | '.join(body)} |"


def models(files: Sequence[Sequence[dict[str, Any]]]) -> Iterator[str]:
    """Yield one Markdown table over several models and the tasks that all of them have learned: exact match in per cent
    of a model's own full cache, the mean over the models with the least and the most.
    """
    tasks = shared(files, "task")
    files = [[row for row in rows if row["task"] in tasks] for rows in files]
    yield f"Tasks: {', '.join(tasks)}.\n"
    columns = [(mode.value, budget) for mode in QueryMode for budget in shared(files, "budget")]
    yield from head(columns)
    for method in shared(files, "method"):
        body = []
        for mode, budget in columns:
            found = [pooled(chosen(rows, mode, method, budget)) for rows in files]
            full = [pooled(chosen(rows, mode, "full", "1.0")) for rows in files]
            pairs = [(one, whole) for one, whole in zip(found, full, strict=True) if one and whole]
            refused = next((one for one, _ in pairs if "smallest" in one), None)
            shares = [100 * one["exact_match"] / whole["exact_match"] for one, whole in pairs if not refused]
            spread = f"{mean(shares):.0f} ({min(shares):.0f}-{max(shares):.0f})" if shares else ""
            body.append(shown(refused) if refused else spread)
        yield f"| `{method}` | {' | '.join(body)} |"


def shared(files: Sequence[Sequence[dict[str, Any]]], field: str) -> list[str]:
    """Return what all of these files hold in a field, controls apart, the methods by name and the budgets by size."""
    found = [{row[field] for row in rows if row["budget"][:2] == "0."} for rows in files]
    return sorted(set.intersection(*found))


def head(columns: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield the head of a table with a column for each mode and budget."""
    heads = [f"{mode.removeprefix('question_')}, {float(budget):.0%}" for mode, budget in columns]
    yield f"| method | {' | '.join(heads)} |"
    yield "|---" * (len(columns) + 1) + "|"


def chosen(rows: Sequence[dict[str, Any]], mode: str, method: str, budget: str) -> list[dict[str, Any]]:
    """Return the rows of one method, a row for each task."""
    return [row for row in rows if (row["mode"], row["method"], row["budget"]) == (mode, method, budget)]


def pooled(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the answers of several tasks as one."""
    if not rows or any("smallest" in row for row in rows):
        return rows[0] if rows else None
    samples = sum(row["samples"] for row in rows)
    right = round(sum(row["exact_match"] * row["samples"] for row in rows))
    return {"exact_match": right / samples, "ci": wilson(right, samples)}


def shown(row: dict[str, Any] | None) -> str:
    """Return exact match in per cent with its interval, or the budget from which on a method works."""
    if row is None:
        return ""
    if "smallest" in row:
        return f"from {100 * row['smallest']:.0f} %" if row["smallest"] else "refused"
    low, high = row["ci"]
    return f"{100 * row['exact_match']:.0f} ({100 * low:.0f}-{100 * high:.0f})"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("measure", help="answer samples and write one line per number")
    run.add_argument("--model", default="minimile-xs")
    run.add_argument("--tasks", nargs="*", help="ids; by default those that the model has learned")
    run.add_argument("--methods", nargs="*", default=METHODS, help="names; `all` for every recipe")
    run.add_argument("--budgets", nargs="*", type=float, default=BUDGETS)
    run.add_argument("--samples", type=int, default=60)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--out", type=Path, required=True)
    for name in ("tables", "recipes", "models"):
        commands.add_parser(name).add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    if options.command == "models":
        print("\n".join(models([read([path]) for path in options.files])))
        return
    if options.command != "measure":
        print("\n".join({"tables": tables, "recipes": recipes}[options.command](read(options.files))))
        return
    torch.set_num_threads(1)
    bed = load_testbed(testbed_folder(options.model))
    learned = [name for name, record in bed.records.items() if record.learned and not name.endswith("_hard")]
    everything = [entry.name for entry in registry.entries("recipe") if entry.name != "full"]
    methods = everything if options.methods == ["all"] else options.methods
    measure(bed, cells(options.tasks or learned, methods, options.budgets), options.samples, options.seed, options.out)


if __name__ == "__main__":
    main()
