"""Widgets: one ES module each, alive in Jupyter through anywidget, and in the book's pages without a kernel."""

from .planner import quant_planner
from .tokens import token_viewer, vocabulary_script

__all__ = ["quant_planner", "token_viewer", "vocabulary_script"]
