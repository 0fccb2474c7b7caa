"""Figures in one style: SVG with live text, labels in the language of the page, colours for every eye."""

from .attention_plots import plot_growth, plot_roofline, plot_tiles, slope
from .mask_view import show_mask
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
from .training_plots import (
    plot_bits,
    plot_documents,
    plot_losses,
    plot_padding,
    plot_power_law,
    plot_schedules,
    plot_sweep,
)

__all__ = [
    "label",
    "page_language",
    "plot_attention_pattern",
    "plot_bits",
    "plot_documents",
    "plot_growth",
    "plot_losses",
    "plot_memory_needs",
    "plot_padding",
    "plot_parameter_shares",
    "plot_power_law",
    "plot_roofline",
    "plot_rope",
    "plot_schedules",
    "plot_sweep",
    "plot_tiles",
    "show",
    "show_mask",
    "slope",
    "styled",
]
