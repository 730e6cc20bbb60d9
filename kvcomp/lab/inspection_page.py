"""The page of `kvcomp inspect`: a prompt, its images, and what became of each token under one or two strategies."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from kvcomp.lab.inspection import Fate, LayerFate, Prompt
from kvcomp.lab.page import data_url, embed_json, render_page
from kvcomp.lab.pictures import Picture

LONGEST_SIDE = 640  # pixels of an image on the page
PHOTO = 160 * 160  # larger images are written as JPEG

LEGEND = (
    ("kept", "kept: has a slot of its own"),
    ("merged", "merged: lives on in another token's slot"),
    ("evicted", "evicted: gone"),
    ("evidence", "evidence: what the answer rests on"),
)
NOTE = (
    "Move the sliders with the arrow keys. Tab to a token or a patch, and move with the arrow keys: a line shows where "
    "it went, or what came to it."
)


def render_inspection(prompt: Prompt, fates: Sequence[Fate]) -> str:
    """Return the whole page. Every text of the prompt and of the answers is shown as text.

    Args:
        prompt: that was asked.
        fates: of one or more strategies, of the same model.
    """
    names = " and ".join(f"{fate.strategy} at {fate.budget}" for fate in fates)
    title = f"{prompt.title}: {names}"
    body = _head(prompt, names) + _controls(fates[0], bool(prompt.evidence)) + _panels(fates)
    data = embed_json("data", _data(prompt, fates))
    return render_page(title, body + data, styles=("inspect.css",), script="inspect.js")


def _head(prompt: Prompt, names: str) -> str:
    asked = f"{len(prompt.tokens):,} tokens, {len(prompt.pictures)} images"
    wanted = "" if prompt.reference is None else f"; the answer is {_quote(prompt.reference)}"
    return (
        f'<h1 dir="auto">What became of every token</h1>\n'
        f'<p class="lead"><span dir="auto">{escape(prompt.title)}</span>: {asked}{wanted}. Under {escape(names)}.</p>\n'
    )


def _controls(fate: Fate, evidence: bool) -> str:
    layers, heads = len(fate.layers), len(fate.layers[0].homes)
    keys = "".join(
        f'<li class="key {name}">{escape(text)}</li>' for name, text in LEGEND if evidence or name != "evidence"
    )
    return (
        '<noscript><p class="warning">This page needs its own script to show the tokens; it loads nothing from '
        "elsewhere.</p></noscript>\n"
        '<form class="controls" id="controls">\n'
        f"{_slider('layer', 'Layer', layers)}{_slider('head', 'KV head', heads)}"
        '<label class="switch"><input type="checkbox" id="lines"> Draw all merges</label>\n'
        f'</form>\n<ul class="legend">{keys}</ul>\n<p class="soft">{escape(NOTE)}</p>\n'
    )


def _slider(name: str, label: str, count: int) -> str:
    return (
        f'<label class="slider">{label} <output id="{name}-shown"></output>'
        f'<input type="range" id="{name}" min="0" max="{count - 1}" value="0" step="1"></label>\n'
    )


def _panels(fates: Sequence[Fate]) -> str:
    panels = "".join(_panel(number, fate) for number, fate in enumerate(fates))
    return f'<div class="panels count-{len(fates)}">\n{panels}</div>\n'


def _panel(number: int, fate: Fate) -> str:
    verdict = {True: '<b class="right">right</b> ', False: '<b class="wrong">wrong</b> ', None: ""}[fate.right]
    threshold = "" if fate.threshold is None else f", threshold on rho {fate.threshold:g}"
    return (
        f'<section class="panel" data-fate="{number}" aria-label="{escape(fate.strategy)}">\n'
        f"<h2>{escape(fate.strategy)} <small>budget {escape(fate.budget)}, {fate.share:.1%} of the bytes{threshold}"
        f'</small></h2>\n<p class="answer">{verdict}{_quote(fate.answer)}</p>\n'
        '<div class="chart"></div>\n<p class="state" aria-live="polite"></p>\n'
        '<div class="prompt" role="group" aria-label="tokens of the prompt"></div>\n'
        '<p class="readout" aria-live="polite">&nbsp;</p>\n</section>\n'
    )


def _quote(text: str) -> str:
    return f'<q dir="auto">{escape(_shortened(text))}</q>'


def _shortened(text: str, most: int = 600) -> str:
    return text if len(text) <= most else f"{text[:most]} ... ({len(text):,} characters)"


def _data(prompt: Prompt, fates: Sequence[Fate]) -> dict[str, Any]:
    return {
        "tokens": [_shortened(token, 200) for token in prompt.tokens],
        "modality": list(prompt.modality),
        "pictures": [_picture(picture) for picture in prompt.pictures],
        "evidence": list(prompt.evidence),
        "fates": [_fate(fate) for fate in fates],
    }


def _picture(picture: Picture) -> dict[str, Any]:
    image = picture.image
    return {
        "source": _source(image),
        "width": image.width,
        "height": image.height,
        "positions": list(picture.positions),
        "columns": picture.columns,
        "rows": picture.rows,
        "exact": picture.exact,
    }


def _source(image: Image.Image) -> str:
    shown, buffer = image.convert("RGB"), io.BytesIO()
    shown.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    if shown.width * shown.height > PHOTO:
        shown.save(buffer, format="JPEG", quality=85)
        return data_url(buffer.getvalue(), "image/jpeg")
    shown.save(buffer, format="PNG")
    return data_url(buffer.getvalue(), "image/png")


def _fate(fate: Fate) -> dict[str, Any]:
    return {
        "strategy": fate.strategy,
        "threshold": fate.threshold,
        "layers": [_layer(layer) for layer in fate.layers],
    }


def _layer(layer: LayerFate) -> dict[str, Any]:
    """Return a layer as the script reads it: homes are little-endian int32, head after head."""
    homes = layer.homes.numpy().astype("<i4").tobytes()
    return {
        "number": layer.number,
        "rho": layer.rho,
        "counts": [list(layer.counts(head)) for head in range(len(layer.homes))],
        "homes": base64.b64encode(homes).decode("ascii"),
    }
