"""A line break in a Markdown paragraph becomes a space on the page, which is wrong between two Chinese characters."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from docutils import nodes
from sphinx.transforms import SphinxTransform

if TYPE_CHECKING:
    from docutils.nodes import Node
    from sphinx.application import Sphinx

_WIDE = "\u2014\u2018-\u201d\u2026\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"
_BETWEEN = re.compile(rf"(?<=[{_WIDE}])[ \t]*\n[ \t]*(?=[{_WIDE}])")
_HAS_WIDE = re.compile(f"[{_WIDE}]")


def _edge(siblings: list[Node], place: int, character: int) -> str:
    """Return the first (0) or last (-1) character of a neighbour, or nothing where there is none."""
    text = siblings[place].astext() if 0 <= place < len(siblings) else ""
    return text[character] if text else ""


def place_of(node: nodes.Text) -> int:
    """Return a text node's place among its siblings. `parent.index` would find the first one with equal text."""
    return next(i for i, child in enumerate(node.parent.children) if child is node)


def join_lines(node: nodes.Text) -> str:
    """Return the text without the line breaks that stand between two Chinese characters.

    The neighbours count: a break after an emphasized word is a text node of its own.
    """
    siblings, place = node.parent.children, place_of(node)
    before, after = _edge(siblings, place - 1, -1), _edge(siblings, place + 1, 0)
    joined = _BETWEEN.sub("", before + node.astext() + after)
    return joined[len(before) : len(joined) - len(after)]


_AS_WRITTEN = (nodes.literal_block, nodes.raw, nodes.math, nodes.math_block, nodes.comment)


class JoinChineseLines(SphinxTransform):
    """Remove soft line breaks inside Chinese paragraphs, and mark emphasis on Latin words, which stays italic."""

    default_priority = 800

    def apply(self) -> None:
        """Replace the text nodes that change."""
        for node in list(self.document.findall(nodes.Text)):
            if "\n" in node and not isinstance(node.parent, _AS_WRITTEN):
                text = join_lines(node)
                if text != node.astext():
                    node.parent[place_of(node)] = nodes.Text(text)
        for node in self.document.findall(nodes.emphasis):
            if not _HAS_WIDE.search(node.astext()):
                node["classes"].append("latin")


def setup(app: Sphinx) -> None:
    """Register the transform."""
    app.add_transform(JoinChineseLines)
