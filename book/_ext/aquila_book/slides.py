"""Slides of a chapter, from the cells that its author has marked; they open from a folder, without a network.

A marked cell has `slideshow: {slide_type: ...}` in its metadata, as Jupyter's own editor writes it: "slide" begins one,
"fragment" appears at the next key, "-" goes on. Of a code cell its output is shown. Of prose, which is too long for a
slide, `slide` in the metadata is shown in its place: Markdown, a text or a list of lines. nbconvert writes the slides,
reveal.js shows them.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from sphinx.errors import ExtensionError

from . import figures, languages

if TYPE_CHECKING:
    from nbformat import NotebookNode
    from sphinx.application import Sphinx

TEMPLATES = Path(__file__).resolve().parents[2] / "_templates"
ASSET = "revealjs"
INSIDE = "sphinx_revealjs/_static/revealjs/"
FILES = ("LICENSE", "dist/reset.css", "dist/reveal.css", "dist/reveal.js")
KINDS = ("slide", "subslide", "fragment", "-")


def marked(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the cells that are marked, in order."""
    return [cell for cell in notebook.cells if cell.metadata.get("slideshow", {}).get("slide_type") in KINDS]


def on_a_slide(cell: NotebookNode, number: int) -> NotebookNode:
    """Return what a slide has of a cell.

    Args:
        cell: a marked one; it is not changed.
        number: of the cell, which makes the names inside its figures its own.
    """
    cell = nbformat.from_dict(cell)
    if cell.cell_type == "markdown":
        lines = cell.metadata.get("slide", cell.source)
        cell.source = lines if isinstance(lines, str) else "\n".join(lines)
        return cell
    cell.metadata["transient"] = {"remove_source": True}
    for place, output in enumerate(cell.outputs):
        if svg := output.get("data", {}).get("image/svg+xml"):  # nbconvert would make a picture without words of it
            output.data = {"text/html": figures.inline("".join(svg), prefix=f"s{number}-{place}-")}
    return cell


def slides_of(notebook: NotebookNode, lang: str, static: str) -> str:
    """Return the page with the slides of a notebook.

    Args:
        notebook: with marked cells.
        lang: of the page, such as "zh-CN".
        static: the address of _static from the page.
    """
    from nbconvert import SlidesExporter

    exporter = SlidesExporter(template_name="slides", extra_template_basedirs=[str(TEMPLATES)])
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    cells = [on_a_slide(cell, number) for number, cell in enumerate(marked(notebook))]
    deck = nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)
    title = cells[0].source.lstrip("# ").split("\n")[0]
    return exporter.from_notebook_node(deck, {"book": {"lang": lang, "title": title, "static": static}})[0]


def copy_reveal(target: Path) -> None:
    """Copy reveal.js out of the package that it was fetched in.

    Raises:
        ExtensionError: it was not fetched.
    """
    from aquila2_tut import assets

    try:
        archive = zipfile.ZipFile(assets.path(ASSET))
    except assets.AssetError as error:
        raise ExtensionError(f"the slides need reveal.js: {error}") from None
    target.mkdir(parents=True, exist_ok=True)
    with archive:
        for name in FILES:
            (target / Path(name).name).write_bytes(archive.read(INSIDE + name))


def _write_slides(app: Sphinx, exception: Exception | None) -> None:
    """Write a page of slides for each notebook with marked cells, beside the pages of its language."""
    if exception or app.builder.format != "html":
        return
    for name in sorted(app.env.found_docs):
        source = Path(str(app.env.doc2path(name)))
        if source.suffix != ".ipynb" or not marked(notebook := nbformat.read(source, as_version=4)):
            continue
        page = Path(app.outdir, name).parent / "slides" / f"{source.stem}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        lang = languages.TAGS[languages.language_of(app.config, name)]
        page.write_text(slides_of(notebook, lang, "../" * (name.count("/") + 1) + "_static"), encoding="utf-8")
        copy_reveal(Path(app.outdir) / "_static/reveal")


def setup(app: Sphinx) -> dict[str, Any]:
    """Write slides after the pages."""
    app.connect("build-finished", _write_slides)
    return {"parallel_read_safe": True}
