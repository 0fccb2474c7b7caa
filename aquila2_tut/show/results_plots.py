"""Figures of published results: means of two languages, and shares with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from matplotlib.axes import Axes

from .plots import BLUE, MUTED, ORANGE, label, new_figure, show, styled

if TYPE_CHECKING:
    from ..evaluate.intervals import Estimate

_OURS = "Aquila"  # the family that the book is about stands out


@styled
def plot_languages(means: Mapping[str, tuple[float, float]], name: str = "") -> None:
    """Show of each model the mean over English and over Chinese tasks, and the way between them.

    Args:
        means: model -> (English, Chinese), in percent; drawn in this order from the top.
        name: what they are, in the language of the page; by default the mean of ten tasks.
    """
    figure, axes = new_figure(height=1.3 + 0.3 * len(means))
    for place, (english, chinese) in enumerate(means.values()):
        axes.plot([english, chinese], [place, place], color=MUTED, linewidth=2, zorder=1)
    places = range(len(means))
    axes.plot([pair[0] for pair in means.values()], places, "s", color=ORANGE, label=label("English", "英文"))
    axes.plot([pair[1] for pair in means.values()], places, "o", color=BLUE, label=label("Chinese", "中文"))
    _name_rows(axes, list(means))
    axes.set_xlabel(name or label("mean of ten tasks, %", "十项任务的平均（%）"))
    figure.legend(loc="outside upper center", ncols=2, handlelength=1.0)
    words = label("; ", "；").join(
        label(f"{name}: English {en:.1f}, Chinese {zh:.1f}", f"{name}：英文 {en:.1f}，中文 {zh:.1f}")
        for name, (en, zh) in means.items()
    )
    show(figure, words, label("Means of English and Chinese tasks", "英文任务与中文任务的平均"))


def _name_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    for text in axes.get_yticklabels():
        text.set_fontweight("bold" if text.get_text().startswith(_OURS) else "normal")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


@styled
def plot_intervals(shares: Mapping[str, Estimate]) -> None:
    """Show shares of right answers with their 95 % intervals.

    Args:
        shares: model -> the share, between 0 and 1, and where it may lie.
    """
    figure, axes = new_figure(height=1.1 + 0.3 * len(shares))
    for place, found in enumerate(shares.values()):
        low, value, high = (100 * one for one in (found.low, found.value, found.high))
        axes.plot([low, high], [place, place], color=MUTED, linewidth=5, alpha=0.45, solid_capstyle="butt")
        axes.plot([value], [place], "o", color=BLUE)
        axes.text(high + 1, place, f"{value:.1f}", va="center")
    _name_rows(axes, list(shares))
    axes.set(xlim=(0, 108), xlabel=label("right answers, %, and 95 % interval", "答对的比例（%）与 95% 区间"))
    words = label("; ", "；").join(
        label(
            f"{name}: {found.value:.1%}, between {found.low:.1%} and {found.high:.1%}",
            f"{name}：{found.value:.1%}，区间 {found.low:.1%} 至 {found.high:.1%}",
        )
        for name, found in shares.items()
    )
    show(figure, words, label("Shares with their intervals", "比例与区间"))
