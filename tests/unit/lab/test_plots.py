"""The plot has what it should show, and can be drawn for any number of recipes."""

from matplotlib.figure import Figure
from PIL import Image

from kvcomp.lab.plots import draw_rho, figure, save_png, to_svg


def panels(drawn):
    return {axes.get_title(loc="left"): axes for axes in drawn.get_axes()}


def test_there_is_a_panel_per_task_for_decode_time_and_for_rho(document):
    drawn = panels(figure(document))
    assert list(drawn) == ["a", "b", "time per decoded token", "rho: share of attention that crosses modalities"]
    assert [label.get_text() for label in drawn["a"].get_yticklabels()] == ["full", "good", "bad"]


def test_exact_match_is_drawn_at_its_value(document):
    axes = panels(figure(document))["a"]
    small = axes.containers[1].lines[0]  # the second budget: bad, good
    assert list(small.get_xdata()) == [0.1, 0.9]
    assert [round(place) for place in small.get_ydata()] == [2, 1]


def test_no_two_of_ten_tasks_look_alike():
    axes = Figure().subplots()
    draw_rho(axes, {f"task {number}": [0.1, 0.2] for number in range(10)}, [])
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.get_lines()}
    assert len(looks) == 10


def test_the_png_is_an_image_on_white(document, tmp_path):
    save_png(document, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > 800
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_the_svg_takes_its_ink_from_the_page_and_keeps_dollars(document):
    for row in document["rows"]:
        row["recipe"] = row["recipe"].replace("bad", "$bad$")
    document["recipes"]["$bad$"] = document["recipes"]["bad"]
    svg = to_svg(document)
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert ">$bad$</text>" in svg


def test_one_recipe_without_rho_or_times_can_be_drawn(document):
    rows = [row | {"rho": [None, None], "decode_ratio": None} for row in document["rows"] if row["recipe"] == "full"]
    drawn = panels(figure(document | {"rows": rows}))
    assert list(drawn) == ["a", "b", "time per decoded token"]
