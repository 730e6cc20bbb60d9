"""Does MiniMile tell methods apart? Exact match of every task against the budget, and the controls that say what a
task measures at all.

    python benchmarks/ruler.py measure --out benchmark-output/ruler.jsonl --samples 60
    python benchmarks/ruler.py tables benchmark-output/ruler.jsonl

`measure` goes on where an earlier run stopped; several may share the work, each with tasks and a file of its own.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvcomp.core.budget import Budget
from kvcomp.core.registry import registry
from kvcomp.core.strategy import Strategy
from kvcomp.lab.batches import Batch, QueryMode
from kvcomp.lab.controls import Method, find_method
from kvcomp.lab.evaluation import Evaluation
from kvcomp.lab.tasks import Task
from kvcomp.lab.testbed import load_testbed

BUDGETS = (0.05, 0.1, 0.2, 0.4, 0.6)
METHODS = ("random", "recency", "streaming-llm", "h2o", "snapkv", "flowmm", "kvcomp-global", "oracle")
CONTROLS = (
    ("full", "1.0"),
    ("no-context", "1.0"),
    ("recency", "1t"),
    ("recency", "32t"),
    ("no-images", "text"),
    ("random", "0.2"),
)
NO_IMAGES: dict[str, Any] = {
    "name": "no-images",
    "scorer": {"use": "text-first", "scorer": {"use": "position", "sinks": 0}},
    "selector": "top-k",
}


class NoImages(Method):
    """Keeps exactly the text, so a batch must be one sample: what a task loses without any visual token."""

    def strategy_for(self, batch: Batch) -> Strategy:
        """Return the strategy with room for the text of this sample."""
        text = int((~batch.visual & batch.inputs["attention_mask"].bool()).sum(dim=1).max())
        return replace(self.strategy, budget=Budget.parse({"tokens": text - batch.question_tokens}))


@dataclass(frozen=True)
class Cell:
    """One number of the table: a task under a method at a budget."""

    task: str
    mode: str
    method: str
    budget: str

    def key(self) -> tuple[str, ...]:
        """Return what tells it from the others."""
        return self.task, self.mode, self.method, self.budget


def cells(tasks: Sequence[str]) -> Iterator[Cell]:
    """Yield what is to be measured, the controls first."""
    modes = [mode.value for mode in QueryMode]
    for task in tasks:
        for mode in modes:
            yield Cell(task, mode, "full", "1.0")
            yield Cell(task, mode, "no-images", "text")
        yield Cell(task, modes[0], "no-context", "1.0")
        yield Cell(task, modes[0], "recency", "1t")
        yield Cell(task, modes[0], "recency", "32t")
        for mode in modes:
            for method in METHODS:
                for budget in BUDGETS:
                    yield Cell(task, mode, method, str(budget))


def measure(model: str, tasks: Sequence[str], samples: int, seed: int, out: Path) -> None:
    """Append one line to `out` for every cell that it does not hold yet."""
    bed = load_testbed(testbed_folder(model))
    known = {entry.name: entry.value for entry in registry.entries("task")}
    done = {Cell(*(row[name] for name in ("task", "mode", "method", "budget"))).key() for row in read([out])}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file, torch.inference_mode():
        for cell in cells(tasks):
            if cell.key() not in done:
                row = measured(bed, known[f"mini/{cell.task}"], cell, samples, f"eval-{seed}")
                file.write(json.dumps(row) + "\n")
                file.flush()


def measured(bed: Any, task: Task, cell: Cell, samples: int, split: str) -> dict[str, Any]:
    """Return the row of one cell."""
    method = NoImages(find_method(NO_IMAGES).strategy) if cell.method == "no-images" else found(cell)
    evaluation = Evaluation(
        bed,
        method,
        samples=samples,
        split=split,
        mode=QueryMode(cell.mode),
        batch=1 if cell.method == "no-images" else 30,
        max_new_tokens=16,
    )
    result = evaluation.run(task)
    return {
        "task": cell.task,
        "mode": cell.mode,
        "method": cell.method,
        "budget": cell.budget,
        "samples": result.samples,
        "exact_match": round(result.exact_match, 4),
        "ci": [round(bound, 4) for bound in result.ci],
        "slots": round(result.slots, 1),
    }


def found(cell: Cell) -> Method:
    """Return the method of a cell at its budget."""
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
    by_key = {Cell(row["task"], row["mode"], row["method"], row["budget"]).key(): row for row in rows}
    tasks, modes = list(dict.fromkeys(row["task"] for row in rows)), [mode.value for mode in QueryMode]

    def shown(*key: str) -> str:
        if (row := by_key.get(key)) is None:
            return ""
        low, high = row["ci"]
        return f"{100 * row['exact_match']:.0f} ({100 * low:.0f}-{100 * high:.0f})"

    yield "| task | full | no context | 1 slot | last 32 slots | without images | random at 0.2 |"
    yield "|---|---|---|---|---|---|---|"
    for task in tasks:
        body = [shown(task, modes[0], *control) for control in CONTROLS]
        yield f"| `{task}` | {' | '.join(body)} |"
    for mode in modes:
        for task in tasks:
            yield f"\n`{task}`, {mode.replace('_', ' ')}: full cache {shown(task, mode, 'full', '1.0')}\n"
            yield f"| method | {' | '.join(f'{float(budget):.0%}' for budget in BUDGETS)} |"
            yield "|---" * (len(BUDGETS) + 1) + "|"
            for method in METHODS:
                body = [shown(task, mode, method, str(budget)) for budget in BUDGETS]
                yield f"| `{method}` | {' | '.join(body)} |"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("measure", help="answer samples and write one line per number")
    run.add_argument("--model", default="minimile-xs")
    run.add_argument("--tasks", nargs="*", help="ids; all ten by default")
    run.add_argument("--samples", type=int, default=60)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--out", type=Path, required=True)
    show = commands.add_parser("tables", help="print Markdown tables of what was measured")
    show.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    if options.command == "tables":
        print("\n".join(tables(read(options.files))))
        return
    torch.set_num_threads(1)
    tasks = [entry.value for entry in registry.entries("task") if entry.name.startswith("mini/")]
    ids = options.tasks or [task.id for task in tasks if not task.hard]
    measure(options.model, ids, options.samples, options.seed, options.out)


if __name__ == "__main__":
    main()
