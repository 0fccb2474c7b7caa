"""Figures of the attention chapter: tiles, growth with the length, and rooflines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..memory import GPU
from .plots import BLUE, GREEN, MUTED, ORANGE, PALETTE, SKY, YELLOW, label, new_figure, new_panels, show, styled

# ---------- tiles ----------

KINDS: tuple[tuple[str, str, str], ...] = (  # English, Chinese, colour
    ("all visible", "全部可见", BLUE),
    ("partly visible", "部分可见", SKY),
    ("computed, nothing visible", "算了，但全不可见", YELLOW),
    ("skipped", "跳过", "none"),
)


def tile_kinds(visible: Any, ranges: Any, block: int) -> np.ndarray:
    """Return the index in `KINDS` of every tile.

    Args:
        visible: (T, S) truths.
        ranges: (ceil(T / block), 2), the first tile that a block of queries computes and one past the last.
        block: tokens on each side of a tile.
    """
    seen, bounds = np.asarray(visible, dtype=bool), np.asarray(ranges)
    down, across = (-(-many // block) for many in seen.shape)
    kinds = np.full((down, across), 3)
    for i, (first, end) in enumerate(bounds):
        for j in range(first, end):
            tile = seen[i * block : (i + 1) * block, j * block : (j + 1) * block]
            kinds[i, j] = 0 if tile.all() else 1 if tile.any() else 2
    return kinds


def _draw_tiles(axes: Axes, kinds: np.ndarray, title: str) -> None:
    for (i, j), kind in np.ndenumerate(kinds):
        colour = KINDS[kind][2]
        edge = MUTED if colour == "none" else colour
        axes.add_patch(Rectangle((j + 0.06, i + 0.06), 0.88, 0.88, facecolor=colour, edgecolor=edge, linewidth=0.8))
    axes.set(xlim=(0, kinds.shape[1]), ylim=(kinds.shape[0], 0), aspect="equal", title=title)
    axes.set_xlabel(label("blocks of keys", "键的块"))
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


@styled
def plot_tiles(panels: Mapping[str, tuple[Any, Any]], block: int) -> None:
    """Show which tiles of the score matrix are computed, panel beside panel.

    Args:
        panels: title -> `visible` and `ranges` as `tile_kinds` takes them.
        block: tokens on each side of a tile.
    """
    figure, every = new_panels(len(panels), 3.1)
    words, found = [], set()
    for axes, (title, (visible, ranges)) in zip(every, panels.items(), strict=True):
        kinds = tile_kinds(visible, ranges, block)
        _draw_tiles(axes, kinds, title)
        found.update(kinds.flatten().tolist())
        counts = [f"{label(en, zh)} {int((kinds == n).sum())}" for n, (en, zh, _) in enumerate(KINDS)]
        words.append(f"{title}: {', '.join(counts)}")
    every[0].set_ylabel(label("blocks of queries", "查询的块"))
    found = [KINDS[n] for n in sorted(found)]
    keys = [Patch(facecolor=c, edgecolor=MUTED if c == "none" else c, label=label(en, zh)) for en, zh, c in found]
    figure.legend(handles=keys, loc="outside upper center", ncols=4, handlelength=1.0, columnspacing=1.4)
    title = label("Tiles that are computed and tiles that are skipped", "计算的小块与跳过的小块")
    show(figure, label("Tiles: ", "小块数：") + "; ".join(words), title)


# ---------- growth ----------


def slope(points: Mapping[int, float]) -> float:
    """Return the slope between the last two points of a curve on double logarithmic axes."""
    (x0, y0), (x1, y1) = sorted(points.items())[-2:]
    return float(np.log(y1 / y0) / np.log(x1 / x0))


def bytes_text(count: float) -> str:
    """Return bytes in the largest binary unit that leaves a number above one: 65536 is "64 KiB"."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.3g} {unit}"
    return f"{count:g} B"


def _draw_curves(axes: Axes, curves: Mapping[str, Mapping[int, float]]) -> None:
    for (name, points), colour in zip(curves.items(), PALETTE, strict=False):
        places = sorted(points)
        axes.plot(places, [points[x] for x in places], "o-", color=colour, linewidth=2, markersize=4, label=name)
    lengths = sorted({x for points in curves.values() for x in points})
    axes.set(xscale="log", yscale="log", xlabel=label("tokens", "词元数"))
    axes.xaxis.set_major_locator(FixedLocator(lengths[::2]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())


@styled
def plot_growth(memory: Mapping[str, Mapping[int, float]], seconds: Mapping[str, Mapping[int, float]]) -> None:
    """Show live memory and time against the length, on double logarithmic axes.

    Args:
        memory: name -> length in tokens -> bytes.
        seconds: the same for the time.
    """
    figure, (left, right) = new_panels(2, 3.4)
    _draw_curves(left, memory)
    _draw_curves(right, seconds)
    powers = [2.0**p for p in range(10, 40, 3)]
    left.yaxis.set_major_locator(FixedLocator(powers))
    left.yaxis.set_major_formatter(FuncFormatter(lambda y, _: bytes_text(y)))
    right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y * 1e3:g}"))
    left.set_title(label("live memory, measured", "同时存活的内存（实测）"))
    right.set_title(label("time in ms, measured", "时间（毫秒，实测）"))
    names, marks = left.get_legend_handles_labels()[::-1]
    figure.legend(marks, names, loc="outside upper center", ncols=len(memory))
    words = [f"{name}: {bytes_text(min(p.values()))} → {bytes_text(max(p.values()))}" for name, p in memory.items()]
    title = label("Memory and time of attention against the length", "注意力的内存与时间随长度的变化")
    show(figure, title + label(". ", "。") + label("; ", "；").join(words), title)


# ---------- roofline ----------


def _draw_roof(axes: Axes, gpu: GPU, colour: str, reach: tuple[float, float]) -> None:
    places = np.array([reach[0], gpu.ridge, reach[1]])
    axes.plot(places, np.minimum(gpu.flops, places * gpu.bandwidth) / 1e12, color=colour, linewidth=2, label=gpu.name)


@styled
def plot_roofline(gpus: Sequence[GPU], work: Mapping[str, float]) -> None:
    """Show how much arithmetic each card can do at a given number of operations a byte, and where kinds of work stand.

    Args:
        gpus: the cards.
        work: name -> operations a byte.
    """
    figure, axes = new_figure(height=3.9)
    reach = (0.5, 2.5 * max(*work.values(), *(gpu.ridge for gpu in gpus)))
    for gpu, colour in zip(gpus, (BLUE, ORANGE, GREEN, *PALETTE), strict=False):
        _draw_roof(axes, gpu, colour, reach)
    for name, intensity in work.items():
        axes.axvline(intensity, color=MUTED, linestyle="--", linewidth=1)
        axes.text(intensity * 0.95, 0.013, name, rotation=90, ha="right", va="bottom", fontsize=9)
    axes.set(xscale="log", yscale="log", xlim=reach, ylim=(0.01, 2000))
    axes.set_xlabel(label("operations a byte (FLOP/B)", "每字节的运算次数（FLOP/B）"))
    axes.set_ylabel(label("at most (TFLOP/s)", "上限（TFLOP/s）"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_minor_locator(NullLocator())
    handles: list[Line2D] = list(axes.get_lines()[: len(gpus)])
    figure.legend(handles=handles, loc="outside upper center", ncols=len(gpus))
    roofs = [
        f"{g.name}: {g.bandwidth / 1e12:.2f} TB/s, {g.flops / 1e12:.0f} TFLOP/s, {g.ridge:.0f} FLOP/B" for g in gpus
    ]
    marks = [f"{name}: {intensity:.0f} FLOP/B" for name, intensity in work.items()]
    show(figure, "; ".join(roofs + marks), label("Rooflines of three GPUs", "三种 GPU 的 roofline"))
