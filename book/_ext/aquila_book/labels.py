"""One site with both languages: the labels of the Chinese chapters get a prefix of their own.

A chapter uses the same labels in both languages, so that the two can be compared. Sphinx wants a label once a site.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

NAME = r"[\w][\w:.+-]*"
_DEFINED = re.compile(rf"^\(({NAME})\)=|^:(?:label|name): *({NAME})|\$\$ *\(({NAME})\)", re.MULTILINE)
# What stands before and after a label, wherever one may stand.
_PLACES = (
    (r"\(", r"\)="),  # (label)=
    (r":(?:label|name): ", r"\b"),
    (r"\$\$ ?\(", r"\)"),  # $$ ... $$ (label)
    (r"\{(?:ref|numref|eq)\}`(?:[^`<]*<)?", r"[`>]"),  # {ref}`label`, {ref}`text <label>`
    (r"\]\(#", r"\)"),  # [text](#label)
    (r"\{solution(?:-start)?\} ", r"\b"),
)


@lru_cache(maxsize=1)
def _pattern(folder: Path) -> re.Pattern[str] | None:
    """Return a pattern whose match ends where a label of the chapters in `folder` begins."""
    labels: set[str] = set()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".md", ".ipynb"):
            text = path.read_text(encoding="utf-8").replace("\\n", "\n").replace('"', "\n")
            labels |= {next(filter(None, groups)) for groups in _DEFINED.findall(text)}
    if not labels:
        return None
    names = "(?:" + "|".join(sorted(map(re.escape, labels), key=len, reverse=True)) + ")"
    return re.compile("|".join(f"{before}(?={names}{after})" for before, after in _PLACES))


def rename(text: str, folder: Path) -> str:
    """Return the source of a chapter with its labels, and references to labels in `folder`, renamed."""
    pattern = _pattern(folder)
    return pattern.sub(r"\g<0>zh-", text) if pattern else text


def _prefix_labels(app: Sphinx, page: str, source: list[str]) -> None:
    """Rename the labels in the source of one Chinese page."""
    if app.config.aquila_language or not page.startswith("book/zh/"):
        return
    source[0] = rename(source[0], Path(app.srcdir) / "book/zh")


def setup(app: Sphinx) -> None:
    """Rename as each page is read."""
    app.connect("source-read", _prefix_labels)
