"""Tables, JSON and progress where the stream is no terminal."""

import json

import pytest
from rich.console import Console

from kvcomp.cli import terminal
from kvcomp.cli.terminal import byte_progress, emit_json, emit_table, plain_table, progress


def test_numbers_are_aligned_on_the_right_and_text_on_the_left():
    text = plain_table(["name", "bytes", "note"], [["a", "7", ""], ["longer", "1,234", "x"]], numbers=["bytes"])
    assert text.splitlines() == ["name    bytes  note", "a           7", "longer  1,234  x"]


def test_a_table_is_plain_text_where_stdout_is_no_terminal(capsys):
    emit_table(["name"], [["[bold]x[/bold]"]])
    assert capsys.readouterr().out == "name\n[bold]x[/bold]\n"


def test_json_is_one_document_and_refuses_nan(capsys):
    emit_json({"rho": None, "name": "é"})
    assert json.loads(capsys.readouterr().out) == {"rho": None, "name": "é"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        emit_json({"rho": float("nan")})


def test_progress_writes_lines_to_stderr_and_only_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with progress("demo", 3) as advance:
        for step in ("one", "two", "three"):
            advance(step)
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err == "demo: 2 of 3, 11 s, two\n"


def test_bytes_are_written_to_stderr_only_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 11.0, 12.0, 22.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with byte_progress() as meter:
        for done, total in ((1, 9000), (2000, 9000), (3000, 9000), (4000, None)):
            meter("downloading x", done, total)
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err == "downloading x: 2,000 of 9,000 bytes\ndownloading x: 4,000 bytes\n"


@pytest.fixture
def on_a_terminal(monkeypatch):
    def console(**options):
        return Console(**options, force_terminal=True, width=100)

    monkeypatch.setattr(terminal, "Console", console)


def test_progress_is_a_bar_on_a_terminal(on_a_terminal, capsys):
    with progress("demo", 2) as advance:
        advance("one")
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "demo" in streams.err
    assert "1/2" in streams.err


def test_bytes_are_a_bar_each_on_a_terminal(on_a_terminal, capsys):
    with byte_progress() as meter:
        meter("downloading x", 0, 2_000_000)
        meter("downloading x", 1_500_000, 2_000_000)
        meter("checking x", 10, None)
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "downloading x" in streams.err
    assert "1.5/2.0 MB" in streams.err
    assert "checking x" in streams.err
