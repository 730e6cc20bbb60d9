"""Texts of unknown origin in Markdown, LaTeX and figures: they say what they said, and do nothing."""

from __future__ import annotations

import re
import unicodedata

LONGEST = 200
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+|~$!])")
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "^": r"\textasciicircum{}",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
}


def plain(text: str, most: int = LONGEST) -> str:
    r"""Return a text on one line, without characters that control anything or turn the direction of writing, and not
    longer than `most`.

    >>> plain("a\nb\x00 \u202ec"), plain("abcdef", 5)
    ('a b c', 'ab...')
    """
    kept = "".join(" " if mark.isspace() else mark for mark in text[: 4 * most] if mark.isspace() or _shows(mark))
    line = " ".join(kept.split())
    return line if len(line) <= most and len(text) <= 4 * most else line[: most - 3] + "..."


def markdown(text: str, most: int = LONGEST) -> str:
    r"""Return a text for a cell of a Markdown table.

    >>> print(markdown("a|b <b>*x*"))
    a\|b &lt;b&gt;\*x\*
    """
    escaped = plain(text, most).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", escaped)


def latex(text: str, most: int = LONGEST) -> str:
    r"""Return a text for LaTeX.

    >>> print(latex("50 % of_{x} \\input"))
    50 \% of\_\{x\} \textbackslash{}input
    """
    return "".join(_LATEX.get(mark, mark) for mark in plain(text, most))


def file_name(text: str) -> str:
    """Return a text as part of the name of a file.

    >>> file_name("mini/recall at 0.2"), file_name("../../etc")
    ('mini-recall-at-0.2', 'etc')
    """
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:60] or "unnamed"


def _shows(mark: str) -> bool:
    return unicodedata.category(mark) not in ("Cc", "Cf", "Cs", "Co", "Cn")
