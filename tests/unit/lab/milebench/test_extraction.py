"""Unpacking: only plain files, only inside, only what is wanted, all or nothing."""

from __future__ import annotations

import io
import tarfile

import pytest

from kvcomp.core.errors import DataError, InputError
from kvcomp.lab.milebench.extraction import extract


def silent(what, done, total):
    """Ignore progress."""


def member(name, kind=tarfile.REGTYPE, link="", mode=0o644):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    return info


def write_archive(path, members, compression="gz"):
    """Write a tar archive of names and contents, or of ready members."""
    with tarfile.open(path, f"w:{compression}") as tar:
        for name, content in members:
            info = member(name) if isinstance(name, str) else name
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


FILES = [
    ("./MileBench/ALFRED/ALFRED.json", b"{}"),
    ("./MileBench/ALFRED/images/1.jpg", b"one"),
    ("./MileBench/DocVQA/DocVQA.json", b"other"),
]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("prefix", ["", "MileBench/", "./MileBench/", "a/b/"])
def test_the_folder_of_a_task_comes_out_whatever_is_above_it(tmp_path, root, prefix):
    files = [(name.replace("./MileBench/", prefix), content) for name, content in FILES]
    archive = write_archive(tmp_path / "a.tar.gz", [(member(f"{prefix}ALFRED/", tarfile.DIRTYPE), b""), *files])
    assert extract(archive, root, ["ALFRED"], silent) == 2
    assert [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()] == [
        "ALFRED/ALFRED.json",
        "ALFRED/images/1.jpg",
    ]
    assert (root / "ALFRED" / "images" / "1.jpg").read_bytes() == b"one"
    assert {path.name for path in root.iterdir()} == {"ALFRED"}


def test_what_is_there_already_is_replaced_file_by_file(tmp_path, root):
    (root / "ALFRED" / "images").mkdir(parents=True)
    (root / "ALFRED" / "images" / "1.jpg").write_bytes(b"old")
    (root / "ALFRED" / "mine.txt").write_bytes(b"mine")
    extract(write_archive(tmp_path / "a.tar.gz", FILES), root, ["ALFRED"], silent)
    assert (root / "ALFRED" / "images" / "1.jpg").read_bytes() == b"one"
    assert (root / "ALFRED" / "mine.txt").read_bytes() == b"mine"


def test_permissions_are_not_taken_over(tmp_path, root):
    extract(
        write_archive(tmp_path / "a.tar.gz", [(member("ALFRED/run", mode=0o6777), b"#!")]), root, ["ALFRED"], silent
    )
    assert (root / "ALFRED" / "run").stat().st_mode & 0o7111 == 0


BAD = {
    "climbs": member("ALFRED/../../out.txt"),
    "climbs from another task": member("DocVQA/../../out.txt"),
    "absolute": member("/ALFRED/out.txt"),
    "drive": member("C:/ALFRED/out.txt"),
    "backslash": member("ALFRED\\..\\out.txt"),
    "symbolic link": member("ALFRED/link", tarfile.SYMTYPE, "/etc/passwd"),
    "symbolic link inside": member("ALFRED/link", tarfile.SYMTYPE, "1.jpg"),
    "hard link": member("ALFRED/link", tarfile.LNKTYPE, "ALFRED/ALFRED.json"),
    "pipe": member("ALFRED/pipe", tarfile.FIFOTYPE),
    "device": member("ALFRED/device", tarfile.CHRTYPE),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_member_is_named_and_nothing_is_unpacked(tmp_path, root, bad, first):
    members = [(bad, b""), *FILES] if first else [*FILES, (bad, b"")]
    with pytest.raises(DataError) as caught:
        extract(write_archive(tmp_path / "a.tar.gz", members), root, ["ALFRED"], silent)
    assert len(caught.value.faults) == 1
    assert repr(bad.name) in str(caught.value)
    assert list(root.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar.gz", "data"}


def test_all_bad_members_are_named(tmp_path, root):
    archive = write_archive(tmp_path / "a.tar.gz", [(bad, b"") for bad in BAD.values()])
    with pytest.raises(DataError) as caught:
        extract(archive, root, ["ALFRED"], silent)
    assert len(caught.value.faults) == len(BAD)


def test_a_file_is_never_written_through_a_link_that_the_archive_made(tmp_path, root):
    members = [(member("ALFRED", tarfile.SYMTYPE, str(tmp_path)), b""), ("ALFRED/out.txt", b"out")]
    with pytest.raises(DataError, match="is a link to"):
        extract(write_archive(tmp_path / "a.tar.gz", members), root, ["ALFRED"], silent)
    assert not (tmp_path / "out.txt").exists()


def test_a_task_that_is_not_there_is_named(tmp_path, root):
    with pytest.raises(DataError, match="IEdit: no file of this task is in the archive"):
        extract(write_archive(tmp_path / "a.tar.gz", FILES), root, ["ALFRED", "IEdit"], silent)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 20, 150])
def test_a_damaged_archive_is_an_input_error(tmp_path, root, keep):
    archive = write_archive(tmp_path / "a.tar.gz", [*FILES, ("ALFRED/noise", bytes(range(256)) * 40)])
    archive.write_bytes(archive.read_bytes()[:keep])
    with pytest.raises((InputError, DataError), match=r"a\.tar\.gz"):
        extract(archive, root, ["ALFRED"], silent)
    assert list(root.iterdir()) == []


def test_a_folder_in_the_place_of_a_file_is_an_input_error(tmp_path, root):
    (root / "ALFRED" / "ALFRED.json").mkdir(parents=True)
    (root / "ALFRED" / "ALFRED.json" / "x").write_text("")
    members = [("ALFRED/ALFRED.json", b""), ("ALFRED/ALFRED.json/y", b"")]
    with pytest.raises(InputError, match="cannot be unpacked"):
        extract(write_archive(tmp_path / "a.tar.gz", members), root, ["ALFRED"], silent)


def test_the_meter_counts_the_compressed_bytes(tmp_path, root):
    seen = []
    archive = write_archive(tmp_path / "a.tar.gz", FILES)
    extract(archive, root, ["ALFRED"], lambda *call: seen.append(call))
    assert {what for what, _, _ in seen} == {"unpacking a.tar.gz"}
    assert seen[-1][1:] == (archive.stat().st_size, archive.stat().st_size)
