from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from ablations import Echo
from PIL import Image

from kvcomp.core.errors import InputError
from kvcomp.lab.provenance import code_version, digest_folder, digest_sample, stop_ids, versions
from kvcomp.version import __version__


def test_a_checkpoint_is_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tasks.json").write_text("{}")  # a record of what it answers, no part of it
    before = digest_folder(tmp_path)
    (tmp_path / "tasks.json").write_text("[]")
    assert digest_folder(tmp_path) == before
    (tmp_path / "config.json").write_text("{ }")
    assert digest_folder(tmp_path) != before
    (tmp_path / "broken.json").symlink_to(tmp_path / "broken.json")
    assert digest_folder(tmp_path)
    assert stop_ids(tmp_path) == []


def test_a_sample_is_all_that_it_asks_and_answers() -> None:
    sample = Echo().sample("eval-0", 0)
    assert digest_sample(sample) == digest_sample(Echo().sample("eval-0", 0))
    others = [
        replace(sample, question="another ?"),
        replace(sample, answer="another"),
        replace(sample, depth=0.5),
        replace(sample, context=(*sample.context, "")),
        replace(sample, context=(sample.context[0], Image.new("RGB", (56, 56)), *sample.context[2:])),
        Echo().sample("eval-0", 1),
    ]
    assert len({digest_sample(each) for each in (sample, *others)}) == len(others) + 1


def test_versions_name_the_code_and_the_libraries() -> None:
    found = versions()
    assert found["kvcomp"] == code_version()
    assert found["kvcomp"].startswith(f"{__version__}+")
    assert {"torch", "transformers", "python"} <= found.keys()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")

    def refuse(*_: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"must be readable: .*model\.safetensors"):
        digest_folder(tmp_path)
