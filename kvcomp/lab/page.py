"""One HTML page that needs no other file: it loads nothing, and its own policy lets nothing be loaded."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PATTERN = (
    "<!doctype html>\n"
    '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    "<title>{title}</title>\n<style>\n{style}</style>\n</head>\n"
    "<body>\n<main>\n{body}</main>\n{end}</body>\n</html>\n"
)


def render_page(title: str, body: str, *, styles: tuple[str, ...] = (), script: str = "", end: str = "") -> str:
    """Return a whole page in light and dark.

    Args:
        title: plain text.
        body: HTML of the main part.
        styles: names of further stylesheets beside `report.css`.
        script: name of a script file that is run when the page is there; none by default.
        end: HTML after the main part.
    """
    code = (FOLDER / script).read_text(encoding="utf-8") if script else ""
    style = "".join((FOLDER / name).read_text(encoding="utf-8") for name in ("report.css", *styles))
    return PATTERN.format(
        policy=_policy(code),
        title=escape(title),
        style=style,
        body=body,
        end=end + (f"<script>{code}</script>\n" if code else ""),
    )


def embed_json(name: str, document: Any) -> str:
    r"""Return an element that holds data for a script; no string in it can end the element.

    >>> embed_json("data", ["</script>"])
    '<script type="application/json" id="data">["\\u003c/script\\u003e"]</script>\n'
    """
    text = json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def data_url(content: bytes, kind: str) -> str:
    """Return the content as an address that needs no file.

    >>> data_url(b"hi", "text/plain")
    'data:text/plain;base64,aGk='
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _policy(code: str) -> str:
    """Return the content security policy: pictures inside the page, styles inside the page, and this one script."""
    rules = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    if not code:
        return rules
    digest = base64.b64encode(hashlib.sha256(code.encode("utf-8")).digest()).decode("ascii")
    return f"{rules}; script-src 'sha256-{digest}'"
