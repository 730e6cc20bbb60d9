"""What an answer depends on beside its question and its strategy: checkpoint, code, and versions of libraries."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from kvcomp.core.errors import InputError
from kvcomp.core.registry import GROUP, registry
from kvcomp.lab.tasks import Sample
from kvcomp.version import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "Pillow")
SOURCES = ("kvcomp", "kvcomp_strategies", "kvcomp_adapters")
APART = ("cli", "testing", "lab")  # of kvcomp, no answer depends on these, but for:
ANSWERING = (
    *("ablation", "answers", "batches", "codec", "controls", "evidence", "jobs", "metrics", "outcomes", "scoring"),
    *("tasks", "testbed"),
)


def digest_folder(folder: Path) -> str:
    """Return the SHA-256 of the files of a checkpoint: weights, configuration, tokenizer and prompt template.

    Raises:
        InputError: a file cannot be read.
    """
    return _digest_files(sorted(path for path in folder.iterdir() if path.is_file() and path.name != "tasks.json"))


def digest_sample(sample: Sample) -> str:
    """Return the SHA-256 of what a sample asks and of its reference answer."""
    total = hashlib.sha256()
    for part in (*sample.context, sample.question, sample.answer):
        head, body = ("text", part.encode()) if isinstance(part, str) else (f"{part.mode} {part.size}", part.tobytes())
        total.update(f"{head} {len(body)}\n".encode() + body)
    total.update(repr((sample.evidence, sample.slots, sample.depth)).encode())
    return total.hexdigest()


def prompt_template(folder: Path) -> str | None:
    """Return the chat template in a checkpoint folder, None where the processor has it elsewhere."""
    path = folder / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def stop_ids(folder: Path) -> list[int]:
    """Return the tokens that end an answer of the model in a folder."""
    try:
        given = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        return []
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


@cache
def code_version() -> str:
    """Return the version of kvcomp with a digest of the sources that answers depend on, as `0.1.0+3f9c2a1b`."""
    return f"{__version__}+{_digest_files(sorted(_sources()))[:8]}"


def versions() -> dict[str, str]:
    """Return the version of everything whose code answers depend on, plugins included."""
    plugins = {entry.package: entry.version for entry in registry.entries() if entry.package != GROUP}
    libraries = {name: version(name) for name in PACKAGES}
    return {GROUP: code_version(), "python": platform.python_version()} | libraries | plugins


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield what is not the same in two documents, by path.

    >>> list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}, "d": 4}))
    ['a.b: 1 -> 3', 'd: nothing -> 4']
    """
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sources() -> Iterator[Path]:
    for package in SOURCES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        for path in root.rglob("*.py"):
            inside = path.relative_to(root).parts
            if package != GROUP or inside[0] not in APART or (inside[0] == "lab" and path.stem in ANSWERING):
                yield path


def _digest_files(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        except OSError as error:
            raise InputError(f"the files of a checkpoint must be readable: {path}: {error}") from None
    return total.hexdigest()
