"""Figures of fine-tuning: three methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .plots import BLUE, INK, MUTED, ORANGE, label, show, styled

Rows = Mapping[str, Mapping[str, Any]]
NAMES = {"full": ("full", "全参数"), "lora": ("LoRA", "LoRA"), "qlora": ("Q-LoRA", "Q-LoRA")}


def _draw_right(axes: Axes, rows: Rows) -> None:
    """A circle a seed, and a bar over the interval in which their mean lies."""
    for place, row in enumerate(rows.values()):
        found = [run["right"][1] * 100 for run in row["runs"]]
        low, mean, high = (row["right"][end] * 100 for end in ("low", "value", "high"))
        axes.plot([max(0, low), min(100, high)], [place] * 2, color=MUTED, linewidth=5, alpha=0.45)
        axes.plot([mean] * 2, [place - 0.22, place + 0.22], color=INK, linewidth=2)
        axes.plot(found, [place] * len(found), "o", color=BLUE, markersize=5)
    axes.set(xlim=(0, 104), title=label("answers right, %", "答对的比例（%）"))


def _draw_bars(axes: Axes, values: Sequence[float], title: str, digits: int) -> None:
    bars = axes.barh(range(len(values)), values, color=ORANGE, height=0.55)
    axes.bar_label(bars, [f"{value:.{digits}f}" for value in values], padding=3)
    axes.set(xlim=(0, 1.4 * max(values)), title=title)


@styled
def plot_methods(rows: Rows) -> None:
    """Show how well each method has learned, how long a step takes, and how much memory the process takes.

    Args:
        rows: method -> what `aquila2_tut.train.published.measured_methods` says of it.
    """
    figure = Figure(figsize=(7.4, 1.1 + 0.5 * len(rows)), layout="constrained")
    FigureCanvasSVG(figure)
    right, time, memory = panels = figure.subplots(1, 3, sharey=True)
    _draw_right(right, rows)
    _draw_bars(time, [row["seconds"] for row in rows.values()], label("seconds a step", "每步秒数"), 1)
    peaks = [row["peak"] / 1e9 for row in rows.values()]
    _draw_bars(memory, peaks, label("memory of the process, GB", "进程内存峰值（GB）"), 2)
    right.set_yticks(range(len(rows)), [label(*NAMES[method]) for method in rows])
    right.invert_yaxis()
    for axes in panels:
        axes.grid(visible=False, axis="y")
        axes.title.set_fontsize("medium")
    words = label("; ", "；").join(_in_words(label(*NAMES[method]), row) for method, row in rows.items())
    show(figure, words, label("Three methods side by side", "三种方法对比"))


def _in_words(name: str, row: Mapping[str, Any]) -> str:
    right, seconds, peak = row["right"]["value"], row["seconds"], row["peak"] / 1e9
    return label(
        f"{name}: {right:.0%} of the answers right, {seconds:.1f} s a step, {peak:.2f} GB",
        f"{name}：答对 {right:.0%}，每步 {seconds:.1f} 秒，{peak:.2f} GB",
    )
