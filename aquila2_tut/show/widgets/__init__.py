"""Widgets: one ES module each, alive in Jupyter through anywidget, and in the book's pages without a kernel.

The names below are imported when they are first used: but for the token viewer they need torch, and most
pages have none.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .memory import memory_planner
    from .planner import quant_planner
    from .rope import rope_scalings
    from .tokens import token_viewer, vocabulary_script

_HOME = {
    "memory_planner": "memory",
    "quant_planner": "planner",
    "rope_scalings": "rope",
    "token_viewer": "tokens",
    "vocabulary_script": "tokens",
}

__all__ = ["memory_planner", "quant_planner", "rope_scalings", "token_viewer", "vocabulary_script"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
