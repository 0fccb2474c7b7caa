"""`{book-glossary}`: the terms of book/glossary.yml, in the language of the page, as a Sphinx glossary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from .languages import language_of

if TYPE_CHECKING:
    from sphinx.application import Sphinx

TERMS = Path(__file__).resolve().parents[2] / "glossary.yml"


def load_terms(path: Path = TERMS) -> list[dict[str, Any]]:
    """Return the terms: each has `en`, `zh`, `note_en`, `note_zh`, and perhaps `avoid`, Chinese words not to use."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))["terms"]


def glossary_lines(terms: list[dict[str, Any]], language: str) -> list[str]:
    """Return the source of a `{glossary}` directive: the term, then the other language's word and the note."""
    other = "zh" if language == "en" else "en"
    lines = ["```{glossary}"]
    for term in terms:
        lines += [term[language], f"  [{term[other]}]{{.other-language}} {term['note_' + language].strip()}", ""]
    return [*lines, "```"]


class BookGlossary(SphinxDirective):
    """All terms of the book, one definition list."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        """Parse the generated glossary in the place of the directive."""
        self.env.note_dependency(str(TERMS))
        lines = glossary_lines(load_terms(), language_of(self.config, self.env.docname))
        box = nodes.container(classes=["book-glossary"])
        self.state.nested_parse(StringList(lines, str(TERMS)), self.content_offset, box)
        return [box]


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("book-glossary", BookGlossary)
