"""Widgets in pages without a kernel: the module of each goes into the page and takes over the stored output.

A page opened from a file may neither import modules nor fetch data, so the module stands in the page itself, and data
that it needs lies in _static as a classic script, loaded when the reader first asks for it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinx.util import logging

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx

FOLDER = Path(__file__).resolve().parents[3] / "aquila2_tut/show/widgets"
_USED = re.compile(r'data-widget="(\w+)"')
_logger = logging.getLogger(__name__)

# anywidget hands a module its model; here the stored state is the model, and `folder` tells that there is no Python.
MOUNT = """
for (const el of document.querySelectorAll('[data-widget="%(name)s"]')) {
  const state = JSON.parse(el.querySelector("script").textContent), listeners = {};
  widget.render({ el, model: {
    folder: "%(folder)s",
    get: (key) => state[key],
    set: (key, value) => { state[key] = value; for (const listener of listeners[`change:${key}`] ?? []) listener(); },
    on: (event, listener) => (listeners[event] ??= new Set()).add(listener),
    off: (event, listener) => listeners[event]?.delete(listener),
    save_changes() {},
  } });
}
"""


# In the dark the theme puts HTML output on a light ground, for the sake of output that knows no dark. A widget does.
FRAME = """\
html[data-theme="dark"] .bd-content div.cell_output .output.text_html:has([data-widget]) {
  background: none; color: inherit; padding: 0;
}
"""


def insert_widgets(body: str, folder: str) -> str:
    """Return a page's body with the module and the style of each widget that stands in it.

    Args:
        body: the HTML of a page.
        folder: the address of _static from this page.
    """
    for name in sorted(set(_USED.findall(body))):
        module, style = ((FOLDER / f"{name}{suffix}").read_text(encoding="utf-8") for suffix in (".js", ".css"))
        mount = MOUNT % {"name": name, "folder": folder}
        body = f'<style>\n{FRAME}{style}</style>\n{body}\n<script type="module">\n{module}{mount}</script>\n'
    return body


def _page(app: Sphinx, _page: str, _template: str, context: dict[str, Any], _tree: nodes.document | None) -> None:
    """Insert what the page's widgets need, and see to their data."""
    body = context.get("body") or ""
    if _USED.search(body):
        context["body"] = insert_widgets(body, context["pathto"]("_static/", 1))
        if 'data-widget="token_viewer"' in body:
            _write_vocabulary(Path(app.outdir) / "_static")


def _write_vocabulary(folder: Path) -> None:
    """Write the vocabulary that the token viewer loads, from the file that the asset step fetched."""
    from aquila2_tut import assets
    from aquila2_tut.gguf import GGUFFile
    from aquila2_tut.show.widgets.tokens import VOCABULARY_FILE, vocabulary_script

    target = folder / VOCABULARY_FILE
    if target.exists():
        return
    try:
        with GGUFFile(assets.path("aquila-tokenizer")) as gguf:
            tokens, merges = (gguf.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges"))
    except assets.AssetError as error:
        _logger.warning("the token viewer will not follow the reader's typing: %s", error, type="aquila_book")
        return
    folder.mkdir(exist_ok=True)
    target.write_text(vocabulary_script(tokens, [tuple(merge.split(" ")) for merge in merges]), encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Complete the pages as they are written."""
    app.connect("html-page-context", _page)
