"""All results as one table for other programs: CSV and, where pyarrow is installed, Parquet."""

from __future__ import annotations

import csv
import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvcomp.lab.results import COLUMNS, Result

CSV_COLUMNS = (
    *COLUMNS,
    *("sample", "prediction", "reference", "exact_match", "kv_bytes", "full_bytes", "score", "metric", "settings"),
    *("slot_accuracy", "depth", "prompt_tokens", "new_tokens", "slots", "compress_seconds", "decode_seconds"),
    *("answer_nll", "kl_to_full", "rho", "retention"),
)
INTEGERS = ("seed", "sample", "exact_match", "prompt_tokens", "new_tokens")
TEXTS = (
    *("model", "task", "query_mode", "strategy", "budget", "prediction", "reference"),
    *("metric", "settings", "rho", "retention"),
)


def write_csv(results: Iterable[Result], path: Path) -> None:
    """Write results as a table, one line each; what was not measured is empty."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        writer.writerows(result.row() for result in results)


def has_pyarrow() -> bool:
    """Return whether Parquet files can be written."""
    return importlib.util.find_spec("pyarrow") is not None


def write_parquet(results: Iterable[Result], path: Path) -> None:
    """Write all results as a Parquet file, in the columns of `results.csv`; budgets are texts: not all are ratios."""
    arrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    rows = [result.row() for result in results]
    columns = {name: [_typed(name, row[name]) for row in rows] for name in CSV_COLUMNS}
    schema = arrow.schema([(name, _arrow_type(arrow, name)) for name in CSV_COLUMNS])
    parquet.write_table(arrow.table(columns, schema=schema), path)


def _typed(name: str, value: Any) -> Any:
    return None if value is None else str(value) if name in TEXTS else value


def _arrow_type(arrow: Any, name: str) -> Any:
    return arrow.int64() if name in INTEGERS else arrow.string() if name in TEXTS else arrow.float64()
