"""Figures in one style: SVG with live text, labels in the language of the page, colours for every eye."""

from .plots import (
    label,
    page_language,
    plot_attention_pattern,
    plot_memory_needs,
    plot_parameter_shares,
    plot_rope,
    show,
    styled,
)

__all__ = [
    "label",
    "page_language",
    "plot_attention_pattern",
    "plot_memory_needs",
    "plot_parameter_shares",
    "plot_rope",
    "show",
    "styled",
]
