"""SVG figures become part of the page: their text can be searched and read aloud, and their colours follow dark mode.

A stylesheet cannot reach into an `<img>`. So each SVG picture is written into the HTML, its ids made unique, its
description (the chapter's `:alt:`, or the title and description inside the file) made its accessible name, and each
colour of the book's figure style replaced by a CSS variable that keeps that colour as its fallback.
"""

from __future__ import annotations

import hashlib
import html
import re
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes

if TYPE_CHECKING:
    from sphinx.application import Sphinx

# Colour in the file -> CSS variable in the page. aquila2_tut/show/plots.py draws with these (a test compares the two).
COLOURS = {
    "#1f2a37": "--figure-ink",
    "#5b6776": "--figure-muted",
    "#d5dbe3": "--figure-grid",
    "#ffffff": "--figure-paper",
    "#0072b2": "--figure-blue",
    "#d55e00": "--figure-orange",
    "#009e73": "--figure-green",
    "#cc79a7": "--figure-pink",
    "#e69f00": "--figure-yellow",
    "#56b4e9": "--figure-sky",
    "#fefefe": "--figure-on-blue",
    "#111111": "--figure-on-colour",
}
_HEX = re.compile("|".join(COLOURS), re.IGNORECASE)
_ID = re.compile(r'(?<=\s)id="([^"]+)"')
_TAG = re.compile(r"<[a-zA-Z][^<>]*>")
_PAINT = re.compile(r'\s(fill|stroke|stop-color)="(var\([^"]+\))"')
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_ABOUT = [
    re.compile(rf"<(?:{tag})\b[^>]*>(.*?)</(?:{tag})>", re.DOTALL) for tag in ("dc:title|title", "dc:description|desc")
]


def description(svg: str) -> str:
    """Return what the file says it shows: its Dublin Core title and description, or its <title> and <desc>."""
    parts = []
    for pattern in _ABOUT:
        match = pattern.search(svg)
        if match and (text := html.unescape(match[1]).strip()) and text not in parts:
            parts.append(text)
    return " ".join(parts)


def _unique_ids(svg: str, prefix: str) -> str:
    """Keep the ids that something refers to, with a prefix of this figure's own; drop the others."""
    used = set(re.findall(r'url\(#([^)"]+)\)', svg)) | set(re.findall(r'href="#([^"]+)"', svg))
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg)
    return _ID.sub(lambda m: f'id="{prefix}{m[1]}"' if m[1] in used else "", svg)


def _as_style(tag: re.Match[str]) -> str:
    """Move an element's book colours into its style: an attribute cannot hold var(), a style property can."""
    found = _PAINT.findall(tag[0])
    if not found:
        return tag[0]
    plain, paint = _PAINT.sub("", tag[0]), "; ".join(f"{name}: {colour}" for name, colour in found)
    if 'style="' in plain:
        return plain.replace('style="', f'style="{paint}; ', 1)
    return re.sub(r"^<\S+", rf'\g<0> style="{paint}"', plain)


def inline(svg: str, alt: str = "", prefix: str = "") -> str:
    """Return the `<svg>` element of a file, ready to stand in a page.

    Args:
        svg: the text of an SVG file.
        alt: what the figure shows; taken from the file when empty.
        prefix: goes before each id; a hash of the figure when empty.
    """
    name = html.escape(alt or description(svg), quote=True)
    svg = _METADATA.sub("", svg[svg.index("<svg") :])
    # A <style> in an inlined drawing would rule the whole page: matplotlib's is in book.css, for figures only.
    svg = re.sub(r"<(title|desc|style)\b[^>]*>.*?</\1>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = _unique_ids(svg, prefix or f"f{hashlib.sha256(svg.encode()).hexdigest()[:8]}-")
    svg = _HEX.sub(lambda m: f"var({COLOURS[m[0].lower()]}, {m[0]})", svg)
    svg = _TAG.sub(_as_style, svg)
    role = f'role="img" aria-label="{name}"' if name else 'aria-hidden="true"'
    return re.sub(r"<svg\b", f'<svg class="book-figure" {role}', svg.strip(), count=1)


def natural_width(svg: str) -> float:
    """Return the width in CSS pixels that a drawing asks for, by its width or its viewBox."""
    if match := re.search(r'<svg[^>]*\swidth="([\d.]+)(pt|px)?"', svg):
        return float(match[1]) * (4 / 3 if match[2] == "pt" else 1)
    match = re.search(r'viewBox="\S+ \S+ ([\d.]+)', svg)
    return float(match[1]) if match else 700.0


def _source(app: Sphinx, node: nodes.image) -> Path | None:
    """Return the SVG file that an image node shows, if it shows one of ours."""
    uri = str(node.get("uri", ""))
    path = Path(app.srcdir) / uri.lstrip("/")
    return path if uri.endswith(".svg") and "://" not in uri and path.is_file() else None


def _alt(node: nodes.image) -> str:
    """Return the node's alternative text; MyST-NB's default, the file name, says nothing."""
    alt = str(node.get("alt", ""))
    return "" if alt.endswith(".svg") or "/" in alt.split(" ")[0] else alt


def _inline_figures(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Replace each SVG image of a page by the drawing itself."""
    if app.builder.format != "html":
        return
    for number, node in enumerate(list(doctree.findall(nodes.image)), start=1):
        if path := _source(app, node):
            svg = inline(path.read_text(encoding="utf-8"), _alt(node), f"f{number}-")
            style = f"--figure-width: {natural_width(svg):.0f}px; {_width(node)}"
            box = f'<div class="book-figure-box" style="{style}">{svg}</div>'
            node.replace_self(nodes.raw("", box, format="html"))


def _width(node: nodes.image) -> str:
    """Return the CSS for a width given in the chapter."""
    width = str(node.get("width", ""))
    return f"max-width: {width}{'px' if width.isdigit() else ''}" if width else ""


def setup(app: Sphinx) -> None:
    """Inline figures after every other transform."""
    app.connect("doctree-resolved", _inline_figures, priority=900)
