"""The few Sphinx hooks that make the book bilingual, searchable in Chinese, legible in the dark, and self-contained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipython_pygments_lexers import IPython3Lexer

from . import figures, glossary, labels, languages, mathjax, search, slides, typography, widgets

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.config import Config

BOOK = Path(__file__).resolve().parents[2]


def _find_assets(_app: Sphinx, config: Config) -> None:
    """Point Sphinx at the book's templates and style, wherever this build's source folder is."""
    config.templates_path.insert(0, str(BOOK / "_templates"))
    config.html_static_path.append(str(BOOK / "_style"))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register every hook of the book."""
    app.add_config_value("aquila_languages", {}, "env", [dict])
    app.add_config_value("aquila_language", "", "env", [str])  # "en" or "zh"; "" in a build of both
    app.add_config_value("aquila_twins", [], "html", [list])  # the pages that the other language has too
    app.connect("config-inited", _find_assets)
    app.add_css_file("book.css")
    app.add_js_file("book.js")
    app.add_lexer("python", IPython3Lexer)  # cells may hold %magic and !commands, which are no Python
    for part in (languages, labels, search, figures, mathjax, glossary, typography, widgets, slides):
        part.setup(app)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
