"""Results of an ablation in a folder: one SQLite file, one row per sample and configuration.

Readers and one writer work at the same time (write-ahead log). The view `rows` holds everything in one table, for other
tools.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvcomp.core.errors import ResultsError
from kvcomp.lab.results import COLUMNS, FORMAT, OWN, Configuration, Planned, Result, Run, Study

FILE, LOCK = "results.sqlite", "run.lock"
WAIT_SECONDS = 10.0  # for another process that is writing at this moment

TABLES = """
CREATE TABLE IF NOT EXISTS runs (
    run INTEGER PRIMARY KEY, config TEXT NOT NULL, environment TEXT NOT NULL, started TEXT NOT NULL, finished TEXT);
CREATE TABLE IF NOT EXISTS configurations (configuration TEXT PRIMARY KEY, document TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS plans (
    run INTEGER NOT NULL, configuration TEXT NOT NULL, place INTEGER NOT NULL, samples INTEGER NOT NULL,
    PRIMARY KEY (run, configuration));
CREATE TABLE IF NOT EXISTS skipped (
    run INTEGER NOT NULL, configuration TEXT NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (run, configuration));
CREATE TABLE IF NOT EXISTS results (
    key TEXT PRIMARY KEY, configuration TEXT NOT NULL, sample INTEGER NOT NULL, digest TEXT NOT NULL,
    prediction TEXT NOT NULL, reference TEXT NOT NULL, exact_match INTEGER NOT NULL, score REAL NOT NULL,
    slot_accuracy REAL NOT NULL, depth REAL, prompt_tokens INTEGER NOT NULL, new_tokens INTEGER NOT NULL,
    kv_bytes REAL NOT NULL, full_bytes REAL NOT NULL, slots REAL NOT NULL, compress_seconds REAL, decode_seconds REAL,
    answer_nll REAL, kl_to_full REAL, rho TEXT NOT NULL, retention TEXT, made TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS results_by_configuration ON results (configuration, sample);
"""
DRAWN = """
CREATE TABLE IF NOT EXISTS drawn (
    run INTEGER NOT NULL, model TEXT NOT NULL, task TEXT NOT NULL, seed INTEGER NOT NULL, sample INTEGER NOT NULL,
    digest TEXT NOT NULL, PRIMARY KEY (run, model, task, seed, sample));
"""  # by itself: folders of earlier versions lack it
VIEW = f"""
CREATE VIEW IF NOT EXISTS rows AS SELECT
    {", ".join(f"json_extract(document, '$.{name}') AS {name}" for name in COLUMNS)},
    json_extract(document, '$.settings') AS settings, json_extract(document, '$.metric') AS metric, results.*
    FROM results JOIN configurations USING (configuration)
"""  # noqa: S608, the names are ours


def holds_results(folder: Path) -> bool:
    """Return whether a folder holds a file of results."""
    return (folder / FILE).exists()


def read_study(folder: Path) -> Study:
    """Return what a folder holds, complete or not, also while a run is writing to it.

    Raises:
        ResultsError: there are no results, or they cannot be read.
    """
    if not holds_results(folder):
        raise ResultsError(f"a folder of results holds {FILE}, and {folder} does not; `kvcomp ablate` makes one")
    with _failures(folder, "read"), _reader(folder) as connection:
        _check_format(connection, folder)
        return _read(connection, folder)


class ResultsWriter:
    """The one process that writes to a folder. Use it as a context manager; what was added is on the disk.

    Args:
        folder: made if it is not there.

    Raises:
        ResultsError: another run is writing to the folder, or it cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with _failures(folder, "written"):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(folder)
        try:
            with _failures(folder, "written"):
                self._connection = _connect(f"file:{_quoted(folder / FILE)}")
                self._prepare()
        except BaseException:
            self._lock.close()
            raise
        self.run = 0

    def __enter__(self) -> ResultsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._lock.close()

    def latest(self) -> Run | None:
        """Return the latest run before this one, None where there is none."""
        with _failures(self.folder, "read"):
            entry = _latest(self._connection)
        return None if entry is None else entry[1]

    def begin(self, planned: Sequence[Planned], config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Write down what a run is going to do."""
        with self._transaction() as connection:
            cursor = connection.execute(
                "INSERT INTO runs (config, environment, started) VALUES (?, ?, ?)",
                (json.dumps(config), json.dumps(environment), _now()),
            )
            self.run = int(cursor.lastrowid or 0)
            connection.executemany(
                "INSERT OR IGNORE INTO configurations VALUES (?, ?)",
                [(entry.configuration.id, json.dumps(asdict(entry.configuration))) for entry in planned],
            )
            connection.executemany(
                "INSERT INTO plans VALUES (?, ?, ?, ?)",
                [(self.run, entry.configuration.id, place, entry.samples) for place, entry in enumerate(planned)],
            )

    def draw(self, model: str, task: str, seed: int, digests: Mapping[int, str]) -> None:
        """Write down which samples are asked, by their numbers: a task's may change from run to run."""
        with self._transaction() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO drawn VALUES (?, ?, ?, ?, ?, ?)",
                [(self.run, model, task, seed, sample, own) for sample, own in digests.items()],
            )

    def known(self, keys: Sequence[str]) -> set[str]:
        """Return which of these results are there already."""
        with _failures(self.folder, "read"):
            found = self._connection.execute(
                "SELECT key FROM results WHERE key IN (SELECT value FROM json_each(?))", (json.dumps(list(keys)),)
            )
            return {key for (key,) in found}

    def add(self, results: Sequence[Result]) -> None:
        """Write results, all of them or none; once this returns, no crash of the process loses them."""
        with self._transaction() as connection:
            names = ("key", "configuration", *OWN)
            connection.executemany(
                f"INSERT OR IGNORE INTO results ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",  # noqa: S608
                [_values(result) for result in results],
            )

    def skip(self, configuration: Configuration, reason: str) -> None:
        """Write down that a configuration cannot be, and why."""
        with self._transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO skipped VALUES (?, ?, ?)", (self.run, configuration.id, reason))

    def finish(self) -> None:
        """Write down that the run is complete."""
        with self._transaction() as connection:
            connection.execute("UPDATE runs SET finished = ? WHERE run = ?", (_now(), self.run))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _failures(self.folder, "written"), self._connection:
            yield self._connection

    def _prepare(self) -> None:
        connection = self._connection
        if not connection.execute("PRAGMA user_version").fetchone()[0]:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(f"BEGIN;{TABLES};{VIEW};PRAGMA user_version = {FORMAT};COMMIT;")
        _check_format(connection, self.folder)
        connection.executescript(DRAWN)


def _values(result: Result) -> tuple[Any, ...]:
    own = {name: getattr(result, name) for name in OWN}
    own |= {"exact_match": int(result.exact_match), "rho": json.dumps(result.rho), "made": result.made or _now()}
    own["retention"] = None if result.retention is None else json.dumps(result.retention)
    return (result.key, result.configuration.id, *own.values())


def _read(connection: sqlite3.Connection, folder: Path) -> Study:
    latest = _latest(connection)
    if latest is None:
        raise ResultsError(f"the results in {folder} are of a run that never began; run `kvcomp ablate` again")
    number, run = latest
    plan = connection.execute(
        "SELECT configuration, document, samples FROM plans JOIN configurations USING (configuration) "
        "WHERE run = ? ORDER BY place",
        (number,),
    ).fetchall()
    planned = {key: Planned(Configuration(**json.loads(document)), samples) for key, document, samples in plan}
    results = connection.execute(
        f"SELECT configuration, {', '.join(OWN)} FROM results JOIN plans USING (configuration) "  # noqa: S608
        "WHERE plans.run = ? AND sample < plans.samples ORDER BY place, sample",
        (number,),
    )
    (total,) = connection.execute("SELECT count(*) FROM results").fetchone()
    skipped = dict(connection.execute("SELECT configuration, reason FROM skipped WHERE run = ?", (number,)))
    drawn = _drawn(connection, number)
    every = [_result(planned[key].configuration, dict(zip(OWN, own, strict=True))) for key, *own in results]
    asked = [result for result in every if drawn.get(_place(result), result.digest) == result.digest]
    found = tuple(result for result in asked if result.configuration.id not in skipped)
    return Study(run, tuple(planned.values()), found, total - len(asked), skipped)


def _drawn(connection: sqlite3.Connection, run: int) -> dict[tuple[str, str, int, int], str]:
    """Return the digests of the samples that a run has drawn, by model, task, seed and number."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'drawn'").fetchone():
        return {}
    rows = connection.execute("SELECT model, task, seed, sample, digest FROM drawn WHERE run = ?", (run,))
    return {(model, task, seed, sample): own for model, task, seed, sample, own in rows}


def _place(result: Result) -> tuple[str, str, int, int]:
    made = result.configuration
    return made.model, made.task, made.seed, result.sample


def _result(configuration: Configuration, own: dict[str, Any]) -> Result:
    retention = own["retention"] and tuple(tuple(heads) for heads in json.loads(own["retention"]))
    own |= {"exact_match": bool(own["exact_match"]), "rho": tuple(json.loads(own["rho"])), "retention": retention}
    return Result(configuration, **own)


def _latest(connection: sqlite3.Connection) -> tuple[int, Run] | None:
    found = connection.execute(
        "SELECT run, config, environment, started, finished FROM runs ORDER BY run DESC LIMIT 1"
    ).fetchone()
    if found is None:
        return None
    number, config, environment, started, finished = found
    return number, Run(json.loads(config), json.loads(environment), started, finished)


def _take_lock(folder: Path) -> sqlite3.Connection:
    """Return what holds the folder until it is closed, or the process ends however it ends."""
    with _failures(folder, "written"):
        lock = _connect(f"file:{_quoted(folder / LOCK)}", wait=0.0)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        lock.close()
        if _is_busy(error):
            raise ResultsError(
                f"another run is writing to {folder}: wait until it ends, stop it, or give this one another --out"
            ) from None
        raise ResultsError(f"the results in {folder} cannot be written: {error}") from None
    return lock


@contextmanager
def _reader(folder: Path) -> Iterator[sqlite3.Connection]:
    """Open the results for reading; in a folder that cannot be written to as a file that does not change."""
    path = folder / FILE
    address = f"file:{_quoted(path)}?mode=ro"
    connection = _connect(address)
    try:
        try:
            connection.execute("SELECT 1 FROM sqlite_master").fetchone()
        except sqlite3.OperationalError as error:
            if _is_busy(error) or path.with_name(f"{FILE}-wal").exists():
                raise
            connection.close()
            connection = _connect(f"{address}&immutable=1")
        yield connection
    finally:
        connection.close()


def _connect(address: str, wait: float | None = None) -> sqlite3.Connection:
    return sqlite3.connect(address, uri=True, timeout=WAIT_SECONDS if wait is None else wait)


def _check_format(connection: sqlite3.Connection, folder: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version != FORMAT:
        raise ResultsError(
            f"the results in {folder} have format {version}, and this version of kvcomp reads {FORMAT}; "
            "use the version that wrote them, or another folder"
        )


@contextmanager
def _failures(folder: Path, done: str) -> Iterator[None]:
    """Say what a failure of the disk or of the database means."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if isinstance(error, ResultsError):
            raise
        raise ResultsError(f"the results in {folder} cannot be {done}: {_explain(error)}") from None


def _explain(error: BaseException) -> str:
    if isinstance(error, sqlite3.Error) and _is_busy(error):
        return f"another program has locked {FILE}; close it and run the same command with --resume"
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith("SQLITE_FULL"):
        return "the disk is full; make room and run the same command with --resume: nothing that was written is lost"
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN")):
        return f"the folder or the file cannot be written to ({error}); give a folder that can"
    if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return f"{FILE} is no database of kvcomp, or a broken one ({error}); give another folder"
    return str(error)


def _is_busy(error: BaseException) -> bool:
    return getattr(error, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


def _quoted(path: Path) -> str:
    """Return a path as part of a URI."""
    return path.absolute().as_uri().removeprefix("file://")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
