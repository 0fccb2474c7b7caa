"""What every widget of the book has: a module, a stylesheet, and a stored output that needs no kernel.

In Jupyter, anywidget runs the module. The stored output of a notebook is plain HTML that shows the first state, with
that state beside it as JSON; book/_ext/aquila_book/widgets.py puts the module into the page, which brings it to life.
Nothing in that HTML differs from run to run.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any, ClassVar

import anywidget

FOLDER = Path(__file__).parent


def module_and_style(name: str) -> tuple[str, str]:
    """The JavaScript module of a widget and its stylesheet."""
    return tuple((FOLDER / f"{name}{suffix}").read_text(encoding="utf-8") for suffix in (".js", ".css"))


class BookWidget(anywidget.AnyWidget):
    """A widget whose output also stands in a page without a kernel.

    A subclass names its files, says which traits make up its state, and draws the first state in plain HTML.
    """

    widget: ClassVar[str] = ""  # name.js and name.css in this folder
    state: ClassVar[tuple[str, ...]] = ()  # the traits that the module reads

    def __init_subclass__(cls, **options: Any) -> None:
        if "widget" in cls.__dict__:  # not in the classes that ipywidgets derives by itself
            cls._esm, cls._css = module_and_style(cls.widget)
        super().__init_subclass__(**options)

    def first_look(self) -> str:
        """The first state as HTML, for a reader whose browser runs no scripts."""
        raise NotImplementedError

    def title(self) -> str:
        """The widget in a few words, for where there is no HTML either."""
        raise NotImplementedError

    def stored_html(self) -> str:
        """The output that a notebook keeps: the first look, and the state from which the page makes the rest."""
        state = json.dumps({key: getattr(self, key) for key in self.state}, ensure_ascii=False)
        data = state.replace("<", "\\u003c")  # a text may hold "</script>"
        script = f'<script type="application/json">{data}</script>'
        kind = f'class="{self.widget.replace("_", "-")}" data-widget="{self.widget}"'
        return f"<div {kind}>{self.first_look()}{script}</div>"

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """For Jupyter the live widget, for everything else the stored HTML."""
        data, metadata = super()._repr_mimebundle_(**options)
        return data | {"text/html": self.stored_html(), "text/plain": f"[{self.title()}]"}, metadata


def escape(text: str) -> str:
    """Text as it must stand in HTML."""
    return html.escape(text, quote=False)
