"""Figures of long context: what is found where, what a position costs, and which way of stretching serves best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from .plots import BLUE, GREEN, MUTED, ORANGE, PALETTE, label, new_figure, new_panels, show, styled

Cells = Mapping[tuple[int, float], float]
METHOD_NAMES = {
    "none": ("unscaled", "不缩放"),
    "linear": ("linear (PI)", "线性（PI）"),
    "ntk": ("NTK-aware", "NTK-aware"),
    "dynamic": ("dynamic NTK", "动态 NTK"),
    "yarn": ("YaRN", "YaRN"),
}


def method_name(method: str) -> str:
    """How a scaling is called in the language of the page; a name that is none of them stays what it is."""
    return label(*METHOD_NAMES.get(method, (method, method)))


# ---------- frequencies ----------


@styled
def plot_slowing(slowed: Mapping[str, Sequence[float]], whole: int) -> None:
    """Show by how many times each scaling slows each pair of components.

    Args:
        slowed: a method -> (D / 2,) how many times longer a pair's full turn takes than in training.
        whole: how many pairs, from the fastest on, make a full turn within the trained length, drawn as a line.
    """
    figure, axes = new_figure()
    for number, (name, factors) in enumerate(slowed.items()):
        dashes = ("-", "--", ":", "-.")[number % 4]
        axes.plot(factors, dashes, color=PALETTE[number % len(PALETTE)], linewidth=2, label=method_name(name))
    axes.axvline(whole - 0.5, color=MUTED, linestyle="--", linewidth=1.2)
    said = (
        "pair of components (right of the dashed line: less than a turn in training)",
        "分量对的编号（虚线右侧：训练中不足一圈）",
    )
    axes.set_xlabel(label(*said))
    axes.set_ylabel(label("times slower", "变慢的倍数"))
    axes.set_yscale("log", base=2)
    steps = [2**power for power in range(math.ceil(math.log2(max(map(max, slowed.values())))) + 1)]
    axes.set_yticks(steps, [f"{step}" for step in steps])
    axes.margins(x=0.01)
    figure.legend(loc="outside upper center", ncols=min(5, len(slowed)))
    words = [_slowing_in_words(method_name(name), factors, whole) for name, factors in slowed.items()]
    show(figure, label("; ", "；").join(words), label("How scalings slow the rotation", "各缩放方法把旋转放慢多少"))


def _slowing_in_words(name: str, factors: Sequence[float], whole: int) -> str:
    first, edge, last = (float(factors[place]) for place in (0, whole - 1, -1))
    return label(
        f"{name}: {first:.1f} times slower at the first pair, {edge:.1f} at pair {whole - 1}, {last:.1f} at the last",
        f"{name}：第一对慢 {first:.1f} 倍，第 {whole - 1} 对 {edge:.1f} 倍，最后一对 {last:.1f} 倍",
    )


# ---------- passkeys ----------


@styled
def plot_passkey(maps: Mapping[str, Cells]) -> None:
    """Show how often a number is found, by the length of the text and by where the number lies in it.

    Args:
        maps: what was asked (a method, a language) -> (length in tokens, depth from 0 to 1) -> share of right answers.
            All have the same lengths and depths.

    Raises:
        ValueError: the maps are of different cells, or there is none.
    """
    if not maps or len({tuple(sorted(cells)) for cells in maps.values()}) != 1:
        raise ValueError("maps of the same lengths and depths are needed, at least one")
    lengths, depths = (sorted({cell[side] for cell in next(iter(maps.values()))}) for side in (0, 1))
    figure, panels = new_panels(len(maps), 1.3 + 0.3 * len(depths), share_y=True)
    for axes, (name, cells) in zip(panels, maps.items(), strict=True):
        _draw_map(axes, lengths, depths, cells)
        axes.set_title(method_name(name), fontsize="medium")
    panels[0].set_ylabel(label("where it lies", "所在位置"))
    figure.supxlabel(label("tokens of the text", "文本的词元数"), fontsize="medium")
    words = [_map_in_words(method_name(name), lengths, cells) for name, cells in maps.items()]
    show(figure, label("; ", "；").join(words), label("Numbers found in a long text", "长文中找数字"))


def _draw_map(axes: Axes, lengths: Sequence[int], depths: Sequence[float], cells: Cells) -> None:
    """A square a cell, the stronger the more often it is right, with the percentage in it."""
    for (length, depth), share in cells.items():
        column, row = lengths.index(length), depths.index(depth)
        corner = (column - 0.48, row - 0.48)
        axes.add_patch(Rectangle(corner, 0.96, 0.96, color=BLUE, alpha=round(0.6 * share, 3)))
        axes.text(column, row, f"{share:.0%}".rstrip("%"), ha="center", va="center", fontsize=9)
    axes.set(xlim=(-0.5, len(lengths) - 0.5), ylim=(len(depths) - 0.5, -0.5))
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=9)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _map_in_words(name: str, lengths: Sequence[int], cells: Cells) -> str:
    means = [np.mean([share for (length, _), share in cells.items() if length == one]) for one in lengths]
    found = [
        label(f"{mean:.0%} at {length:,} tokens", f"{length:,} 个词元时 {mean:.0%}")
        for length, mean in zip(lengths, means, strict=True)
    ]
    return f"{name}{label(': ', '：')}{label(', ', '，').join(found)}"


# ---------- bits per byte by position ----------

Curve = Sequence[tuple[int, int, float]]


@styled
def plot_positions(curves: Mapping[str, Curve], trained: int) -> None:
    """Show what a byte costs by its position in a text.

    Args:
        curves: a method, or any name -> (first position, last, bits per byte), one a band.
        trained: positions that the model was trained on, drawn as a line.
    """
    figure, axes = new_figure()
    for number, (name, curve) in enumerate(curves.items()):
        edges = [curve[0][0], *(end for _, end, _ in curve)]
        colour, dashes = PALETTE[number % len(PALETTE)], ("-", "--", ":", "-.")[number % 4]
        values = [bits for *_, bits in curve]
        axes.stairs(values, edges, baseline=None, color=colour, linestyle=dashes, linewidth=2, label=method_name(name))
    axes.axvline(trained, color=MUTED, linestyle="--", linewidth=1.2)
    ends = sorted({end for curve in curves.values() for _, end, _ in curve})
    axes.set_xticks([0, *ends], [f"{end:,}" for end in (0, *ends)])
    axes.set_xlabel(label("position (dashed: the length it was trained on)", "位置（虚线：训练长度）"))
    axes.set_ylabel(label("bits per byte", "每字节比特数"))
    figure.legend(loc="outside upper center", ncols=min(5, len(curves)))
    words = [_curve_in_words(method_name(name), curve) for name, curve in curves.items()]
    show(figure, label("; ", "；").join(words), label("Bits per byte by position", "各位置的每字节比特数"))


def _curve_in_words(name: str, curve: Curve) -> str:
    (_, first, begin), (last, end, bits) = curve[0], curve[-1]
    return label(
        f"{name}: {begin:.2f} up to position {first:,}, {bits:.2f} from {last:,} to {end:,}",
        f"{name}：位置 {first:,} 以内 {begin:.2f}，{last:,} 到 {end:,} 为 {bits:.2f}",
    )


# ---------- methods side by side ----------


class Before(NamedTuple):
    """A figure of each seed, as the method leaves the model and after some training at the new length."""

    stretched: Sequence[float]
    tuned: Sequence[float]


@styled
def plot_stretched(rows: Mapping[str, Before], name: str, reference: float | None = None) -> None:
    """Show what each way of stretching gives, before training at the new length and after it: a mark a seed.

    Args:
        rows: method -> its figures.
        name: what they are, with their unit, in the language of the page.
        reference: a figure to compare with, drawn as a line.
    """
    figure, axes = new_figure(height=1.3 + 0.36 * len(rows))
    for place, row in enumerate(rows.values()):
        for values, colour, mark in ((row.stretched, ORANGE, "s"), (row.tuned, GREEN, "o")):
            axes.plot(values, [place] * len(values), mark, color=colour, markersize=6)
    for colour, mark, words in ((ORANGE, "s", ("stretched", "仅缩放")), (GREEN, "o", ("and tuned", "缩放并微调"))):
        axes.plot([], [], mark, color=colour, label=label(*words))
    if reference is not None:
        axes.axvline(reference, color=MUTED, linestyle="--", linewidth=1.2)
    axes.set_yticks(range(len(rows)), [method_name(method) for method in rows])
    axes.set(xlabel=name, ylim=(len(rows) - 0.5, -0.5))
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=2)
    words = [_row_in_words(method_name(method), row) for method, row in rows.items()]
    said = name + label(". ", "。") + label("; ", "；").join(words)
    show(figure, said, label("Scalings compared", "各缩放方法比较"))


def _row_in_words(name: str, row: Before) -> str:
    stretched, tuned = (f"{np.mean(values):.2f}" if len(values) else "–" for values in row)
    return label(f"{name}: {stretched}, tuned {tuned}", f"{name}：{stretched}，微调后 {tuned}")
