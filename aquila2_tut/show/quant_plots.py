"""Figures of the quantization chapter: levels, errors, outliers, and what formats cost in quality, speed and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .plots import BLUE, INK, MUTED, ON_BLUE, ORANGE, PALETTE, PAPER, SKY, label, new_figure, new_panels, show, styled

TEXTS: dict[str, tuple[str, str]] = {  # keys of a format's row, English, Chinese
    "english": ("English", "英文"),
    "chinese": ("Chinese", "中文"),
    "python": ("Python", "Python"),
}
NAMES = {"fp32": "float32", "bf16": "bfloat16", "int8": "LLM.int8()", "nf4": "NF4", "nf4-dq": "NF4-DQ"}
SHORT_MAPS = ("q", "k", "v", "o", "gate", "up", "down")
_LARGEST = 20  # channels of a layer that are drawn one by one
COLON, SEMICOLON, COMMA = (": ", "："), ("; ", "；"), (", ", "，")
EVEN = tuple(code / 7.5 - 1 for code in range(16))  # 4 bits from -1 to 1


def format_name(name: str) -> str:
    """Return what a reader calls a format of `effect.json`, such as "GPTQ-4" for "gptq-4"."""
    if name == "int8-tensor":
        return label("int8 per tensor", "int8（整张量）")
    return NAMES.get(name, name.upper())


def _told(words: Mapping[str, str]) -> str:
    return label(*SEMICOLON).join(f"{name}{label(*COLON)}{text}" for name, text in words.items())


# ---------- weights and levels ----------


def in_blocks(weight: Any, block: int) -> np.ndarray:
    """Return the weights over the largest magnitude of their block: from -1 to 1.

    Args:
        weight: any shape; what is left over at the end has no block, and is not returned.
        block: consecutive weights that share a scale.
    """
    flat = np.asarray(weight, dtype=np.float32).reshape(-1)
    blocks = flat[: len(flat) // block * block].reshape(-1, block)
    return (blocks / np.abs(blocks).max(1, keepdims=True).clip(1e-30)).reshape(-1)


def busiest(numbers: np.ndarray, levels: Sequence[float]) -> tuple[float, float]:
    """Return the share of numbers that are nearest to the least and to the most popular of sorted levels."""
    middles = (np.asarray(levels)[1:] + np.asarray(levels)[:-1]) / 2
    shares = np.bincount(np.searchsorted(middles, numbers), minlength=len(levels)) / len(numbers)
    return float(shares.min()), float(shares.max())


@styled
def plot_weights_and_levels(weight: Any, block: int = 64) -> None:
    """Show how weights are spread in their blocks, and where NF4 and an even grid have their 16 levels.

    Args:
        weight: any shape.
        block: consecutive weights that share a scale.
    """
    from ..quant import NF4_CODE  # here, for it brings the libraries of whole models along

    numbers = in_blocks(weight, block)
    figure, axes = new_figure(height=3.4)
    heights, _, _ = axes.hist(numbers, bins=81, range=(-1, 1), density=True, color=SKY, alpha=0.55)
    top = float(heights.max())
    rows = {"NF4": (NF4_CODE.tolist(), BLUE), label("even", "等距"): (EVEN, ORANGE)}
    words = {}
    for row, (name, (levels, colour)) in enumerate(rows.items()):
        place = -0.11 * top * (row + 1)
        axes.plot(levels, [place] * 16, "|", color=colour, markersize=12, markeredgewidth=2)
        axes.text(-1.06, place, name, ha="right", va="center")
        least, most = busiest(numbers, levels)
        words[name] = label(f"{least:.1%} to {most:.1%}", f"{least:.1%} 到 {most:.1%}")
    axes.set(xlim=(-1.24, 1.05), ylim=(-0.3 * top, None), yticks=[])
    axes.set_xticks(np.linspace(-1, 1, 9))
    axes.set_xlabel(label(f"weight over the largest of its {block}", f"权重除以所在 {block} 个权重中的最大绝对值"))
    axes.spines["left"].set_visible(False)
    said = label("Share of the weights that a level stands for. ", "每个量化级别所代表的权重比例。")
    show(figure, said + _told(words), label("Weights and levels", "权重与量化级别"))


# ---------- errors ----------


@styled
def plot_error_against_bits(curves: Mapping[str, Mapping[int, float]]) -> None:
    """Show the relative error of a linear map's outputs against the bits of a weight.

    Args:
        curves: method -> bits -> the root of what is lost of the outputs' power, 0.05 for 5 %.
    """
    figure, axes = new_figure(height=3.2)
    marks = dict(zip(curves, zip("os^Dv", PALETTE, strict=False), strict=False))
    for name, points in curves.items():
        mark, colour = marks[name]
        places = sorted(points)
        line = mark if len(places) == 1 else f"{mark}-"
        values = [100 * points[bits] for bits in places]
        axes.plot(places, values, line, color=colour, linewidth=1.8, label=name)
    axes.set(yscale="log", xlabel=label("bits a weight", "每个权重的位数"))
    axes.set_ylabel(label("error of the outputs, %", "输出误差（%）"))
    axes.xaxis.set_major_locator(FixedLocator(sorted({bits for points in curves.values() for bits in points})))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    figure.legend(loc="outside upper center", ncols=len(curves))
    words = {
        name: label(*COMMA).join(
            label(f"{bits} bits {points[bits]:.1%}", f"{bits} 位 {points[bits]:.1%}") for bits in sorted(points)
        )
        for name, points in curves.items()
    }
    show(figure, _told(words), label("Error against bits", "误差与位数"))


def _draw_matrix(axes: Axes, grid: np.ndarray, columns: Sequence[str], most: float) -> Any:
    """Draw a matrix as areas whose colour is as strong as its entries, up to `most`."""
    shades = LinearSegmentedColormap.from_list("paper to blue", [PAPER, BLUE])
    mesh = axes.pcolormesh(grid, vmin=0, vmax=most, cmap=shades, edgecolors=PAPER, linewidth=0.6)
    if len(grid) <= 12:
        for (row, column), value in np.ndenumerate(grid):
            ink = ON_BLUE if value > 0.55 * most else INK
            axes.text(column + 0.5, row + 0.5, f"{value:.1f}", ha="center", va="center", color=ink, fontsize=8.5)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=90)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return mesh


@styled
def plot_layer_errors(panels: Mapping[str, Sequence[Sequence[float]]], maps: Sequence[str] = SHORT_MAPS) -> None:
    """Show the relative error of the outputs of every linear map, a panel a method, all in one scale.

    Args:
        panels: method -> layer -> map -> error, 0.05 for 5 %.
        maps: names of the maps.
    """
    grids = {name: 100 * np.asarray(grid, dtype=float) for name, grid in panels.items()}
    most, layers = max(grid.max() for grid in grids.values()), len(next(iter(grids.values())))
    figure, every = new_panels(
        len(grids), 1.4 + max(1.8, 0.26 * layers if layers <= 12 else 0.13 * layers), share_y=True
    )
    for axes, (name, grid) in zip(every, grids.items(), strict=True):
        mesh = _draw_matrix(axes, grid, maps, most)
        axes.set_title(name, fontsize=10.5)
    every[0].set(ylim=(layers, 0), ylabel=label("layer", "层"))
    step = 1 if layers <= 12 else 5
    every[0].set_yticks(np.arange(0, layers, step) + 0.5, [str(layer) for layer in range(0, layers, step)])
    bar = figure.colorbar(mesh, ax=list(every), shrink=0.8, pad=0.02)
    bar.set_label(label("error of the outputs, %", "输出误差（%）"))
    bar.outline.set_visible(False)
    words = {}
    for name, grid in grids.items():
        layer, at = np.unravel_index(grid.argmax(), grid.shape)
        middle, worst = np.median(grid), grid.max()
        words[name] = label(
            f"median {middle:.1f}%, at most {worst:.1f}% ({maps[at]} of layer {layer})",
            f"中位数 {middle:.1f}%，最大 {worst:.1f}%（第 {layer} 层的 {maps[at]}）",
        )
    show(figure, _told(words), label("Errors of all linear maps", "各线性层的误差"))


# ---------- outliers ----------


@styled
def plot_outliers(maxima: Any, threshold: float = 6.0) -> None:
    """Show the largest magnitude that each input channel has in each layer, and the limit of an outlier.

    Args:
        maxima: (layers, channels), the maximum of |x| over the tokens.
        threshold: from which LLM.int8() keeps a channel out of the eight bits.
    """
    grid = np.asarray(maxima, dtype=float)
    figure, axes = new_figure(height=3.2)
    low, middle, high = np.percentile(grid, (5, 50, 95), axis=1)
    layers = np.arange(len(grid))
    axes.vlines(layers, low, high, color=SKY, linewidth=5, label=label("9 channels of 10", "九成通道"))
    axes.plot(layers, middle, "_", color=INK, markersize=7, label=label("the middle one", "中位数"))
    _draw_largest(axes, np.sort(grid)[:, -_LARGEST:], threshold)
    figure.legend(loc="outside upper center", ncols=3)
    axes.axhline(threshold, color=MUTED, linestyle="--", linewidth=1.2)
    axes.set(yscale="log", xlabel=label("layer", "层"), xlim=(-0.6, len(grid) - 0.4))
    axes.set_ylabel(label("largest |x| of a channel", "通道内最大的 |x|"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    counts, layer = (grid >= threshold).sum(1), int(grid.max(1).argmax())
    told = label(
        f"From {threshold:g} on: {counts.min()} to {counts.max()} of {grid.shape[1]:,} channels in a layer. "
        f"The largest of all is {grid.max():,.0f}, in layer {layer}; the middle channel's is {np.median(grid):.2g}.",
        f"达到 {threshold:g} 的通道：每层 {grid.shape[1]:,} 个中有 {counts.min()} 到 {counts.max()} 个。"
        f"最大值 {grid.max():,.0f} 出现在第 {layer} 层；各通道的中位数为 {np.median(grid):.2g}。",
    )
    show(figure, told, label("Outliers among the inputs", "输入中的离群通道"))


def _draw_largest(axes: Axes, largest: np.ndarray, threshold: float) -> None:
    """Draw the largest channels of each layer, (layers, n) sorted, those that are no outliers in a quiet colour."""
    layers = np.repeat(np.arange(len(largest)), largest.shape[1])
    values = largest.reshape(-1)
    for chosen, colour in ((values < threshold, SKY), (values >= threshold, ORANGE)):
        name = label(f"the {largest.shape[1]} largest", f"最大的 {largest.shape[1]} 个") if colour == ORANGE else None
        axes.plot(layers[chosen], values[chosen], "o", color=colour, markersize=3, markeredgewidth=0, label=name)


# ---------- effect, speed and memory ----------


def added(row: Mapping[str, Any], kind: str) -> tuple[float, float, float]:
    """Return by how much a format raises the bits per byte of a kind of text, in per cent of float32's: with interval.

    Args:
        row: a format of `effect.json`.
        kind: a key of `TEXTS`.
    """
    change = row[f"{kind}_change"]
    base = row[kind]["value"] - change["value"]
    return change["value"] / base * 100, change["low"] / base * 100, change["high"] / base * 100


@styled
def plot_effect(formats: Sequence[Mapping[str, Any]]) -> None:
    """Show what each format adds to the bits per byte of three kinds of texts, with intervals.

    Args:
        formats: those of one model in `effect.json`, the first of them float32.
    """
    rows, words = list(formats)[1:], {}
    figure, axes = new_figure(height=1.3 + 0.31 * len(rows))
    for number, (kind, name) in enumerate(TEXTS.items()):
        found = np.array([added(row, kind) for row in rows])
        places = np.arange(len(rows)) + (number - 1) * 0.22
        reach = np.abs(found[:, 1:] - found[:, :1]).T
        style = {"fmt": "os^"[number], "color": PALETTE[number], "markersize": 4.5, "linewidth": 1.8}
        axes.errorbar(found[:, 0], places, xerr=reach, label=label(*name), **style)
    axes.axvline(0, color=MUTED, linewidth=1)
    # Straight up to one per cent, logarithmic beyond: the cliff at 2 bits would hide the rest.
    axes.set_xscale("symlog", linthresh=1)
    _mark_per_cents(axes, max(added(row, kind)[2] for row in rows for kind in TEXTS))
    axes.set_yticks(range(len(rows)), [format_name(row["name"]) for row in rows])
    axes.set_xlabel(label("bits per byte added, % of float32's", "每字节比特数的增加，占 float32 的百分比"))
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=3)
    for row in rows:
        parts = (f"{label(*name)} {round(added(row, kind)[0], 1) + 0.0:+.1f}%" for kind, name in TEXTS.items())
        words[format_name(row["name"])] = label(*COMMA).join(parts)
    show(figure, _told(words), label("What formats cost", "各种格式的代价"))


def _mark_per_cents(axes: Axes, most: float) -> None:
    marks = [x for x in (-0.5, 0, 0.5, 1, 3, 10, 30, 100, 300, 1000) if x < most * 1.1]
    axes.xaxis.set_major_locator(FixedLocator(marks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


@styled
def plot_speed_and_memory(sides: Sequence[Mapping[str, Any]]) -> None:
    """Show how fast a model talks in each format, against the bytes of its weights.

    Args:
        sides: {"name", "weight_bytes", "decode"} each, decode in tokens a second.
    """
    names = [side["name"] for side in sides]
    sizes, speeds = ([side[key] for side in sides] for key in ("weight_bytes", "decode"))
    figure, axes = new_figure(height=1.2 + 0.34 * len(sides))
    bars = axes.barh(range(len(sides)), speeds, color=BLUE, height=0.66)
    axes.bar_label(bars, [_side_text(*both) for both in zip(speeds, sizes, strict=True)], padding=4)
    axes.set_yticks(range(len(sides)), names)
    axes.set(xlim=(0, 1.45 * max(speeds)), xlabel=label("tokens a second, one at a time", "逐词元生成，词元/秒"))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    words = dict(zip(names, map(_side_text, speeds, sizes), strict=True))
    show(figure, _told(words), label("Speed and memory", "速度与内存"))


def _side_text(speed: float, size: float) -> str:
    return label(f"{speed:.0f} tokens/s, {size / 1e6:,.0f} MB", f"{speed:.0f} 词元/秒，{size / 1e6:,.0f} MB")
