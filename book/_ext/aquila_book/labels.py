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
_PLACES = (
    r"(?<=\()(?={0}\)=)",  # (label)=
    r"(?<=:label: )(?={0}\b)",
    r"(?<=:name: )(?={0}\b)",
    r"(?<=\$\$ \()(?={0}\))",  # $$ ... $$ (label)
    r"(?<=\}}`)(?={0}`)",  # {ref}`label`
    r"(?<=<)(?={0}>`)",  # {ref}`text <label>`
    r"(?<=\]\(#)(?={0}\))",  # [text](#label)
    r"(?<=\{{solution\}} )(?={0}\b)",
    r"(?<=\{{solution-start\}} )(?={0}\b)",
)


@lru_cache(maxsize=1)
def _pattern(folder: Path) -> re.Pattern[str] | None:
    """Return a pattern that matches, empty, wherever a label of the chapters in `folder` stands."""
    labels: set[str] = set()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".md", ".ipynb"):
            text = path.read_text(encoding="utf-8").replace("\\n", "\n").replace('"', "\n")
            labels |= {next(filter(None, groups)) for groups in _DEFINED.findall(text)}
    if not labels:
        return None
    names = "(?:" + "|".join(sorted(map(re.escape, labels), key=len, reverse=True)) + ")"
    return re.compile("|".join(place.format(names) for place in _PLACES))


def _prefix_labels(app: Sphinx, page: str, source: list[str]) -> None:
    """Rename the labels in the source of one Chinese page."""
    if app.config.aquila_language or not page.startswith("book/zh/"):
        return
    if pattern := _pattern(Path(app.srcdir) / "book/zh"):
        source[0] = pattern.sub("zh-", source[0])


def setup(app: Sphinx) -> None:
    """Rename as each page is read."""
    app.connect("source-read", _prefix_labels)
