"""Figures in one style: SVG with live text, labels in the language of the page, colours for every eye."""

from .answers import check
from .attention_plots import plot_growth, plot_roofline, plot_tiles, slope
from .evaluation_plots import plot_leak, plot_reasoning, plot_sizes, plot_skills
from .longcontext_plots import Before, method_name, plot_passkey, plot_positions, plot_slowing, plot_stretched
from .lora_plots import loss_differences, plot_adapters, plot_lengths, plot_published, table_rows
from .mask_view import show_mask
from .memory_plots import plot_peaks, plot_steps
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
from .quant_plots import (
    plot_effect,
    plot_error_against_bits,
    plot_layer_errors,
    plot_outliers,
    plot_speed_and_memory,
    plot_weights_and_levels,
)
from .results_plots import plot_intervals, plot_languages
from .scaling_plots import plot_held, plot_placement, strategy_name
from .training_plots import (
    plot_bits,
    plot_documents,
    plot_losses,
    plot_padding,
    plot_power_law,
    plot_schedules,
    plot_sweep,
)
from .tuning_plots import plot_methods

__all__ = [
    "Before",
    "check",
    "label",
    "loss_differences",
    "method_name",
    "page_language",
    "plot_adapters",
    "plot_attention_pattern",
    "plot_bits",
    "plot_documents",
    "plot_effect",
    "plot_error_against_bits",
    "plot_growth",
    "plot_held",
    "plot_intervals",
    "plot_languages",
    "plot_layer_errors",
    "plot_leak",
    "plot_lengths",
    "plot_losses",
    "plot_memory_needs",
    "plot_methods",
    "plot_outliers",
    "plot_padding",
    "plot_parameter_shares",
    "plot_passkey",
    "plot_peaks",
    "plot_placement",
    "plot_positions",
    "plot_power_law",
    "plot_published",
    "plot_reasoning",
    "plot_roofline",
    "plot_rope",
    "plot_schedules",
    "plot_sizes",
    "plot_skills",
    "plot_slowing",
    "plot_speed_and_memory",
    "plot_steps",
    "plot_stretched",
    "plot_sweep",
    "plot_tiles",
    "plot_weights_and_levels",
    "show",
    "show_mask",
    "slope",
    "strategy_name",
    "styled",
    "table_rows",
]
