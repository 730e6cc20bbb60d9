"""`kvcomp inspect` from the command line to the page, and the page in a browser."""

import json
from functools import partial
from pathlib import Path

import pytest
from browser import Tab, needs_chromium, opened
from commands import call, save_untrained
from PIL import Image

from kvcomp.core.registry import registry

inspect = partial(call, "inspect")
BOTH = ("--strategy", "flowmm", "--strategy", "h2o", "--budget", "0.3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained model of the testbed's shape."""
    return save_untrained(tmp_path_factory.mktemp("beds") / "untrained")


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("out") / "page.html"
    result = inspect("--model", folder, "--task", "recall", "--sample", 1, *BOTH, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    return out, json.loads(result.stdout)


def test_the_summary_adds_up_to_the_prompt(made):
    _, document = made
    assert [entry["name"] for entry in document["strategies"]] == ["flowmm", "h2o"]
    assert document["images"] > 1
    for entry in document["strategies"]:
        for layer in entry["layers"]:
            assert layer["kept"] + layer["merged"] + layer["evicted"] == document["tokens"]
            assert layer["kept"] == pytest.approx(0.3 * document["tokens"], abs=1)
            assert (layer["rho"] is None) == (entry["name"] == "h2o")
            assert (layer["merged"] == 0) == (entry["name"] == "h2o")
    assert document["evidence"]
    assert document["page"] == str(made[0])


def test_a_prompt_of_ones_own_with_images(folder, tmp_path):
    Image.new("RGB", (56, 56), "blue").save(tmp_path / "blue.png")
    out = tmp_path / "own.html"
    words = ("--prompt", "what colour ?", "--image", tmp_path / "blue.png", "--image", tmp_path / "blue.png")
    result = inspect("--model", folder, *words, "--strategy", "streaming-llm", "--budget", "0.5", "--out", out)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["strategy", "layer", "kept", "merged", "evicted", "rho"]
    assert [line.split()[0] for line in lines[1:5]] == ["streaming-llm"] * 4
    assert lines[-1] == f"See {out}"
    assert "a prompt" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ([], ["--task, --prompt: give one of them"]),
        (
            ["--task", "recal", "--strategy", "flowm", "--set", "x"],
            ["Did you mean 'recall'?", "--strategy: no recipe named 'flowm'", "--set: x: must"],
        ),
        (["--task", "recall", "--image", "a.png"], ["--image: goes with --prompt"]),
        (["--task", "recall", *["--strategy", "h2o"] * 3], ["--strategy: at most 2 fit side by side, got 3"]),
        (["--task", "recall,order"], ["--task: must name one task"]),
        (
            ["--task", "recall", "--out", "/no/such/folder/page.html"],
            ["--out must be a file in a folder"],
        ),
    ],
)
def test_faults_come_before_the_model_is_loaded(arguments, messages):
    result = inspect("--model", "minimile-xs", *arguments)
    assert result.exit_code == 2
    for message in messages:
        assert message in result.stderr


def test_the_testbed_answers_by_name(tmp_path):
    assert "minimile-xs" in {entry.name for entry in registry.entries("testbed")}
    result = inspect("--task", "recall", "--strategy", "full", "--out", tmp_path / "page.html", "--json")
    entry = json.loads(result.stdout)["strategies"][0]
    assert (entry["share_of_bytes"], entry["threshold"]) == (1.0, None)
    assert all(layer["merged"] == layer["evicted"] == 0 for layer in entry["layers"])


# --- in a browser ---


def states(tab: Tab, panel: int = 0) -> list[int]:
    return tab.evaluate(
        f"['kept', 'merged', 'evicted'].map((state) => panels[{panel}].marks.filter((mark) => "
        "mark.classList.contains(state)).length)"
    )


@needs_chromium
def test_the_page_in_a_browser(made, tmp_path):
    page, document = made
    with opened(page, tmp_path) as tab:
        assert sum(states(tab)) == document["tokens"]
        assert states(tab, 1)[1] == 0
        for width in (375, 1440):
            for dark in (False, True):
                tab.resize(width, dark=dark)
                assert tab.overflow() <= 0
        # the sliders by keyboard
        before = tab.evaluate("panels[0].section.querySelector('.state').textContent")
        tab.evaluate("layerSlider.focus()")
        tab.press("ArrowRight")
        after = tab.evaluate("panels[0].section.querySelector('.state').textContent")
        assert (before[:7], after[:7]) == ("Layer 0", "Layer 1")
        tab.evaluate("headSlider.focus()")
        tab.press("End")
        counts = tab.evaluate("data.fates[0].layers[1].counts[headSlider.max]")
        assert states(tab) == counts
        # tokens by keyboard: one stop of the tab key, then arrows
        assert tab.evaluate("panels[0].prompt.querySelectorAll('[tabindex=\"0\"]').length") == 1
        tab.evaluate("panels[0].marks[0].focus()")
        tab.press("End")
        tab.press("ArrowLeft")
        focused = tab.evaluate("Number(document.activeElement.dataset.token)")
        assert focused == document["tokens"] - 2
        readout = tab.evaluate("panels[0].section.querySelector('.readout').textContent")
        assert f"(token {focused})" in readout
        # a merged token is wired to its home, and all of them when asked
        tab.evaluate("panels[0].marks[panels[0].homes.findIndex((home, token) => home >= 0 && home !== token)].focus()")
        assert tab.evaluate("panels[0].overlay.querySelectorAll('.own').length") == 1
        assert tab.evaluate("panels[0].prompt.querySelectorAll('.target').length") == 1
        tab.evaluate("linesSwitch.click(), linesSwitch.checked")
        assert tab.evaluate("panels[0].overlay.querySelector('.wire').getAttribute('d').split('M').length") > 2
        assert tab.complaints == []
        assert [address for address in tab.requests if not address.startswith("data:")] == [page.as_uri()]


@needs_chromium
def test_patches_lie_on_their_image(made, tmp_path):
    with opened(made[0], tmp_path) as tab:
        inside = tab.evaluate(
            "[...document.querySelectorAll('.frame')].every((frame) => { const box = frame.getBoundingClientRect();"
            "const image = frame.querySelector('img'); const patches = [...frame.querySelectorAll('.patch')];"
            "return image.naturalWidth > 0 && box.width > 60 && patches.length > 1 && patches.every((patch) => {"
            "const own = patch.getBoundingClientRect(); return own.width > 10 && own.left >= box.left - 1 &&"
            "own.right <= box.right + 1 && own.top >= box.top - 1 && own.bottom <= box.bottom + 1; }); })"
        )
        assert inside
        assert tab.evaluate("document.querySelectorAll('.panel:first-of-type .evidence').length") == len(
            made[1]["evidence"]
        )
