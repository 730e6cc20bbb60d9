"""Fetching from a hub on this machine: what comes is checked, what was cut off goes on, what is done is done."""

from __future__ import annotations

import hashlib
import io
import random
import subprocess
import sys
import tarfile
import threading
import time
from functools import cache, partial

import pytest
from fake_hub import serve

from kvcomp.core.errors import DataError, InputError, UnknownNameError
from kvcomp.lab.milebench import SEVEN, archives
from kvcomp.lab.milebench.archives import ARCHIVES, REPOSITORY, Archive, archives_of
from kvcomp.lab.milebench.fetching import check, fetch
from kvcomp.lab.milebench.hub import download_from_hub


@cache
def tar_of(tasks):
    """Return a tar archive with some noise for every task."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for task in tasks:
            content = random.Random(task).randbytes(200_000)
            info = tarfile.TarInfo(f"MileBench/{task}/{task}.json")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def hub(monkeypatch):
    """A hub with small archives under the real names, which `ARCHIVES` describes; of the last one not wholly."""
    contents = {archive: tar_of(archive.tasks) for archive in ARCHIVES}
    small = tuple(
        Archive(archive.number, len(content), hashlib.sha256(content).hexdigest())
        if archive.exact
        else Archive(archive.number, 1, hashlib.sha256(content).hexdigest()[:51], exact=False)
        for archive, content in contents.items()
    )
    monkeypatch.setattr(archives, "ARCHIVES", small)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serve(REPOSITORY, {archive.name: content for archive, content in contents.items()}) as running:
        yield running


def fetch_here(hub, root, tasks=None, **options):
    return fetch(root, tasks, download=partial(download_from_hub, endpoint=hub.url), **options)


def test_five_archives_hold_the_seven_tasks():
    assert [archive.number for archive in ARCHIVES] == [0, 1, 2, 4, 5]
    assert sorted(task for archive in ARCHIVES for task in archive.tasks) == sorted(task.name for task in SEVEN)
    assert sum(archive.num_bytes for archive in ARCHIVES) == pytest.approx(14.5e9, rel=0.01)
    assert [len(archive.sha256) for archive in ARCHIVES] == [64, 64, 64, 64, 51]


def test_tasks_choose_archives_by_any_alias():
    assert [archive.number for archive in archives_of(["STD", "mmcoqa", "IEdit"])] == [2, 4]
    with pytest.raises(UnknownNameError, match=r"named 'ALFREDO' is read here\. Did you mean 'ALFRED'\?"):
        archives_of(["ALFREDO"])


def test_everything_is_fetched_checked_and_unpacked(hub, tmp_path):
    seen = []
    fetched = fetch_here(hub, tmp_path, meter=lambda *call: seen.append(call))
    assert [each.again for each in fetched] == [False] * 5
    assert {path.name for path in tmp_path.iterdir()} == {"archives", *(task.name for task in SEVEN)}
    assert not list(tmp_path.glob("archives/*.tar.gz"))
    name = ARCHIVES[0].name
    assert {what for what, _, _ in seen if name in what} == {f"{verb} {name}" for verb in VERBS}
    assert fetched[4].describe()["digits_compared"] == 51
    assert (tmp_path / "ALFRED" / "ALFRED.json").read_bytes() == random.Random("ALFRED").randbytes(200_000)


VERBS = ("downloading", "checking", "unpacking")


def test_what_is_done_is_not_done_again(hub, tmp_path):
    first = fetch_here(hub, tmp_path, ["ALFRED", "STD"])
    hub.files.clear()
    again = fetch_here(hub, tmp_path, ["ALFRED", "STD"])
    assert [(each.again, each.sha256, each.files) for each in again] == [(True, each.sha256, 1) for each in first]


def test_what_was_removed_since_is_fetched_again(hub, tmp_path):
    fetch_here(hub, tmp_path, ["ALFRED"])
    (tmp_path / "ALFRED" / "ALFRED.json").unlink()
    (tmp_path / "ALFRED").rmdir()
    (each,) = fetch_here(hub, tmp_path, ["ALFRED"])
    assert not each.again
    assert (tmp_path / "ALFRED" / "ALFRED.json").is_file()


def test_a_broken_note_is_no_note(hub, tmp_path):
    fetch_here(hub, tmp_path, ["ALFRED"])
    (tmp_path / "archives" / "MileBench_part0.tar.gz.json").write_text('{"sha256": 3')
    assert not fetch_here(hub, tmp_path, ["ALFRED"])[0].again


def test_archives_stay_where_they_are_wanted(hub, tmp_path):
    fetch_here(hub, tmp_path, ["ALFRED"], keep=True)
    assert (tmp_path / "archives" / "MileBench_part0.tar.gz").read_bytes() == hub.files["MileBench_part0.tar.gz"]


def test_a_download_that_was_stopped_goes_on_where_it_was(hub, tmp_path):
    def stop(what, done, total):
        if done > 50_000:
            raise KeyboardInterrupt

    name = "MileBench_part0.tar.gz"
    with pytest.raises(KeyboardInterrupt):
        download_from_hub(archives.ARCHIVES[0], tmp_path, stop, endpoint=hub.url)
    assert [path.suffix for path in tmp_path.iterdir()] == [".unfinished"]
    path = download_from_hub(archives.ARCHIVES[0], tmp_path, lambda *call: None, endpoint=hub.url)
    assert path.read_bytes() == hub.files[name]
    first, second = hub.ranges[name]
    assert first == 0
    assert second >= 50_000
    assert list(tmp_path.iterdir()) == [path]


def test_a_connection_that_breaks_is_taken_up_again(hub, tmp_path):
    name = "MileBench_part0.tar.gz"
    hub.cut[name] = 90_000
    path = download_from_hub(archives.ARCHIVES[0], tmp_path, lambda *call: None, endpoint=hub.url)
    assert path.read_bytes() == hub.files[name]
    assert hub.ranges[name] == [0, 90_000]


def test_a_wrong_checksum_is_an_error_and_the_file_is_removed(hub, tmp_path):
    path = tmp_path / "archives" / "MileBench_part5.tar.gz"
    path.parent.mkdir()
    path.write_bytes(hub.files[path.name] + b"x")
    with pytest.raises(InputError, match=r"must have a SHA-256 that begins with .{51}, got .{64}; it was removed"):
        fetch_here(hub, tmp_path, ["TextNeedle"])
    assert not path.exists()
    assert not (tmp_path / "TextNeedleInAHaystack").exists()
    assert not fetch_here(hub, tmp_path, ["TextNeedle"])[0].again


def test_a_wrong_length_is_an_error_and_the_file_is_removed(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"123")
    with pytest.raises(InputError, match=r"must have 1,234 bytes, got 3; it was removed, fetch it again"):
        check(path, Archive(0, 1234, "a" * 64), lambda *call: None)
    assert not path.exists()


def test_a_file_that_was_changed_on_the_hub_is_not_even_downloaded(hub, tmp_path):
    hub.files["MileBench_part0.tar.gz"] += b"x"
    with pytest.raises(InputError, match=r"must have a SHA-256 that begins with .* it was changed there since"):
        fetch_here(hub, tmp_path, ["ALFRED"])
    assert hub.ranges == {}


def test_an_archive_without_its_task_is_an_error_and_is_not_noted(hub, tmp_path, monkeypatch):
    content = tar_of(("DocVQA",))
    hub.files["MileBench_part0.tar.gz"] = content
    monkeypatch.setattr(archives, "ARCHIVES", (Archive(0, len(content), hashlib.sha256(content).hexdigest()),))
    for _ in range(2):
        with pytest.raises(DataError, match="ALFRED: no file of this task"):
            fetch_here(hub, tmp_path, ["ALFRED"])


def test_what_the_hub_does_not_have_is_an_input_error(hub, tmp_path):
    hub.files.clear()
    with pytest.raises(InputError, match=r"MileBench_part0\.tar\.gz cannot be downloaded from the dataset .* goes on"):
        fetch_here(hub, tmp_path, ["ALFRED"])


HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_waits_for_the_first(hub, tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    lock = folder / "MileBench_part0.tar.gz.lock"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    told, waiting = [], threading.Event()

    def meter(what, done, total):
        told.append(what)
        if what.startswith("waiting"):
            assert hub.ranges == {}  # nothing is fetched beside the other
            waiting.set()

    def let_go():
        waiting.wait(30)
        other.kill()  # a process that dies lets go as well

    thread = threading.Thread(target=let_go)
    thread.start()
    (fetched,) = fetch_here(hub, tmp_path, ["ALFRED"], meter=meter)
    thread.join()
    other.communicate()
    assert told[0] == "waiting for another process that fetches MileBench_part0.tar.gz"
    assert not fetched.again


def test_two_at_once_fetch_once(hub, tmp_path):
    results, downloads = [], []

    def download(archive, folder, meter):
        downloads.append(archive.name)
        path = folder / archive.name
        path.write_bytes(hub.files[archive.name])
        time.sleep(0.2)  # the other one comes now
        return path

    def run():
        results.extend(fetch(tmp_path, ["STD"], download=download))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(each.again for each in results) == [False, True]
    assert downloads == ["MileBench_part4.tar.gz"]


def test_a_lock_that_cannot_be_taken_is_an_input_error(hub, tmp_path):
    for archive in archives_of(["ALFRED"]):
        (tmp_path / "archives" / f"{archive.name}.lock").mkdir(parents=True)  # the superuser may write into any folder
    with pytest.raises(InputError, match="must be one that can be written to"):
        fetch_here(hub, tmp_path, ["ALFRED"])
