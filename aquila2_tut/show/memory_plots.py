"""Figures of the chapter on memory: a step from operator to operator, and what is there at its peak."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .plots import BLUE, GREEN, MUTED, ORANGE, PINK, SKY, YELLOW, label, new_figure, show, styled

if TYPE_CHECKING:
    from ..memory.rehearse import Rehearsal
    from ..memory.tracker import Moment

_COLUMNS = 240  # of a curve; a step has ten thousand operators
_STAGES = (("forward", "forward", "前向", BLUE), ("backward", "backward", "反向", ORANGE))
_STAGES += (("optimizer", "optimizer", "优化器", GREEN),)
_IN_STAGE = {"before": "forward", "recompute": "backward"}  # a layer is computed again within the backward pass
_PARTS = (  # labels of the account, English, Chinese, colour
    (("weights",), "weights", "权重", BLUE),
    (("adapters", "gradients"), "adapters and gradients", "适配器与梯度", ORANGE),
    (("optimizer",), "optimizer", "优化器状态", GREEN),
    (("activations", "workspace"), "activations", "激活值", SKY),
    (("logits",), "logits", "对数几率", PINK),
    (("buckets", "context"), "context, buffers", "上下文与缓冲区", YELLOW),
)


def columns(timeline: Sequence[Moment], count: int = _COLUMNS) -> list[Moment]:
    """The largest moment of each of `count` equal parts of a step, or all moments where there are fewer."""
    count = min(count, len(timeline))
    ends = [len(timeline) * i // count for i in range(count + 1)]
    return [max(timeline[a:b], key=lambda moment: moment.bytes) for a, b in itertools.pairwise(ends)]


def _draw_step(axes: Axes, name: str, timeline: Sequence[Moment]) -> None:
    found = columns(timeline)
    sizes = [moment.bytes / 1e9 for moment in found]
    stages = [_IN_STAGE.get(moment.stage, moment.stage) for moment in found]
    for stage, en, zh, colour in _STAGES:
        heights = [size if size and here == stage else 0 for size, here in zip(sizes, stages, strict=True)]
        axes.bar(range(len(found)), heights, width=1.0, color=colour, linewidth=0, label=label(en, zh))
    most = max(sizes)
    axes.axhline(most, color=MUTED, linestyle="--", linewidth=1)
    axes.text(0, most, f"{most:.1f} GB", va="bottom")
    axes.set(title=name, xlim=(-1, len(found)), xticks=[])
    axes.grid(visible=False, axis="x")


@styled
def plot_steps(rehearsals: Mapping[str, Rehearsal]) -> None:
    """Show what is alive in the course of a step, a panel for each run, all on one scale.

    Args:
        rehearsals: name -> what was rehearsed. The CUDA context is not in the picture.
    """
    figure = Figure(figsize=(7.4, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(1, len(rehearsals), sharey=True, squeeze=False)[0]
    for axes, (name, found) in zip(panels, rehearsals.items(), strict=True):
        _draw_step(axes, name, found.timeline)
        axes.title.set_fontsize("medium")
    panels[0].set_ylabel(label("GB alive", "占用（GB）"))
    panels[0].set_ylim(0, 1.12 * max(found.allocated_bytes for found in rehearsals.values()) / 1e9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(_STAGES))
    words = label("; ", "；").join(_step_in_words(name, found) for name, found in rehearsals.items())
    show(figure, words, label("Memory in the course of a step", "一步之中的显存"))


def _step_in_words(name: str, found: Rehearsal) -> str:
    before, most, stage = found.timeline[0].bytes / 1e9, found.allocated_bytes / 1e9, found.peak_op.stage
    stage = _IN_STAGE.get(stage, stage)
    there = next(label(en, zh) for key, en, zh, _ in _STAGES if key == stage)
    return label(
        f"{name}: begins with {before:.1f} GB, at most {most:.1f} GB, in the stage {there}",
        f"{name}：开始时 {before:.1f} GB，最多 {most:.1f} GB，出现在{there}阶段",
    )


@styled
def plot_peaks(breakdowns: Mapping[str, Mapping[str, int]]) -> None:
    """Show what memory is spent on at the peak of each run.

    Args:
        breakdowns: name -> `breakdown` of a rehearsal.
    """
    figure, axes = new_figure(height=1.5 + 0.42 * len(breakdowns))
    left = [0.0] * len(breakdowns)
    for keys, en, zh, colour in _PARTS:
        sizes = [sum(row.get(key, 0) for key in keys) / 1e9 for row in breakdowns.values()]
        axes.barh(range(len(left)), sizes, left=left, color=colour, height=0.66, label=label(en, zh))
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axes.text(total, place, f" {total:.1f}", va="center")
    axes.set_yticks(range(len(left)), list(breakdowns))
    axes.set(xlim=(0, 1.1 * max(left)), xlabel="GB")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=3, handlelength=1.0)
    words = label("; ", "；").join(_peak_in_words(name, row) for name, row in breakdowns.items())
    show(figure, words, label("What is there at the peak", "峰值时显存里有什么"))


def _peak_in_words(name: str, row: Mapping[str, int]) -> str:
    sizes = [(label(en, zh), sum(row.get(key, 0) for key in keys) / 1e9) for keys, en, zh, _ in _PARTS]
    parts = label(", ", "，").join(f"{part} {size:.1f}" for part, size in sizes if size >= 0.05)
    return label(
        f"{name}: {sum(row.values()) / 1e9:.1f} GB ({parts})", f"{name}：{sum(row.values()) / 1e9:.1f} GB（{parts}）"
    )
