"""Figures of training: documents in rows, padding, schedules, loss curves, sweeps, power laws and measured bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .plots import BLUE, INK, MUTED, ORANGE, PALETTE, PAPER, label, new_figure, show, styled

Points = Mapping[float, float]
SEMICOLON, COLON, COMMA = ("; ", "；"), (": ", "："), (", ", "、")


def _joined(parts: Sequence[str]) -> str:
    return label(*SEMICOLON).join(parts)


def _plain(axes: Axes, *names: str) -> None:
    """Write the numbers of a logarithmic axis out, and only those of its marks."""
    for name in names:
        axis = getattr(axes, f"{name}axis")
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_minor_locator(NullLocator())


# ---------- documents in rows ----------


def pieces(document_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Return (document, tokens) for each stretch of a row; document 0 is padding."""
    return [(int(number), len(list(same))) for number, same in groupby(np.asarray(document_ids).tolist())]


def _draw_row(axes: Axes, place: int, row: list[tuple[int, int]]) -> None:
    start = 0
    for number, size in row:
        colour = PALETTE[(number - 1) % len(PALETTE)] if number else "none"
        hatch = None if number else "////"
        area = Rectangle((start, place - 0.36), size, 0.72, facecolor=colour, edgecolor=PAPER if number else MUTED)
        area.set(hatch=hatch, linewidth=1.2 if number else 0.6)
        axes.add_patch(area)
        start += size


@styled
def plot_documents(document_ids: Any) -> None:
    """Show the rows of a batch, a colour a document, padding hatched.

    Args:
        document_ids: (B, T), 1, 2, ... for the documents of each row and 0 at padding.
    """
    rows = [pieces(row) for row in np.asarray(document_ids)]
    figure, axes = new_figure(height=0.9 + 0.36 * len(rows))
    for place, row in enumerate(rows):
        _draw_row(axes, place, row)
    axes.set(xlim=(0, sum(size for _, size in rows[0])), ylim=(len(rows) - 0.5, -0.5))
    axes.set(xlabel=label("tokens", "词元"), ylabel=label("rows", "行"))
    axes.set_yticks(range(len(rows)), [str(place + 1) for place in range(len(rows))])
    axes.grid(visible=False)
    words = [
        f"{place}{label(*COLON)}{label(*COMMA).join(_piece_text(*p) for p in row)}" for place, row in enumerate(rows, 1)
    ]
    intro = label("Tokens of the documents in each row. ", "每行中各文档的词元数。")
    show(figure, intro + _joined(words), label("Documents packed into rows", "打包成行的文档"))


def _piece_text(number: int, size: int) -> str:
    return str(size) if number else label(f"{size} of padding", f"填充 {size}")


# ---------- padding ----------

WAYS: dict[str, tuple[str, str]] = {  # keys of `padding_share`, English, Chinese
    "full": ("every sample to full length", "全部补到最大长度"),
    "random": ("to the longest of a random batch", "补到随机一批中最长的"),
    "bucketed": ("batches of like length", "长度相近的组成一批"),
    "packed": ("packed", "打包"),
}


@styled
def plot_padding(shares: Mapping[str, Mapping[str, float]]) -> None:
    """Show which share of what is computed is padding, for several ways of making batches.

    Args:
        shares: name of the data -> what `padding_share` returns.
    """
    ways = list(WAYS)
    height = 0.8 / len(shares)
    figure, axes = new_figure(height=1.4 + 0.32 * len(ways) * len(shares))
    for row, (name, found) in enumerate(shares.items()):
        places = np.arange(len(ways)) + (row - (len(shares) - 1) / 2) * height
        values = [found[way] * 100 for way in ways]
        bars = axes.barh(places, values, height * 0.9, color=PALETTE[row % len(PALETTE)], label=name)
        axes.bar_label(bars, [f"{value:.1f}%" for value in values], padding=4)
    axes.set_yticks(range(len(ways)), [label(*WAYS[way]) for way in ways])
    axes.set(xlim=(0, 112), xlabel=label("padding, % of the tokens computed", "填充占全部计算词元的比例（%）"))
    axes.set_xticks(range(0, 101, 20))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=len(shares))
    words = [
        f"{name}{label(*COLON)}" + label(*COMMA).join(f"{label(*WAYS[way])} {found[way]:.1%}" for way in ways)
        for name, found in shares.items()
    ]
    show(figure, _joined(words), label("Padding in four kinds of batches", "四种组批方式的填充比例"))


# ---------- schedules and loss curves ----------


@styled
def plot_schedules(schedules: Mapping[str, Sequence[float]]) -> None:
    """Show learning rates step by step.

    Args:
        schedules: name -> the learning rate of each step.
    """
    figure, axes = new_figure(height=2.7)
    for name, rates in schedules.items():
        axes.plot(rates, linewidth=2, label=name)
    axes.set(xlabel=label("step", "步"), ylabel=label("learning rate", "学习率"), ylim=(0, None))
    axes.margins(x=0.01)
    figure.legend(loc="outside upper center", ncols=len(schedules))
    words = [f"{name}{label(*COLON)}{_schedule_text(rates)}" for name, rates in schedules.items()]
    show(figure, _joined(words), label("Learning-rate schedules", "学习率调度"))


def _schedule_text(rates: Sequence[float]) -> str:
    top = int(np.argmax(rates))
    return label(
        f"up to {rates[top]:g} at step {top}, at the end {rates[-1]:.2g}",
        f"第 {top} 步升到 {rates[top]:g}，最后为 {rates[-1]:.2g}",
    )


@styled
def plot_losses(curves: Mapping[str, Points], level: float | None = None) -> None:
    """Show losses against the tokens seen.

    Args:
        curves: name -> tokens seen -> nats per token.
        level: the loss of an even guess, drawn as a dashed line.
    """
    figure, axes = new_figure()
    for name, points in curves.items():
        axes.plot(list(points), list(points.values()), linewidth=1.8, label=name)
    if level is not None:
        axes.axhline(level, color=MUTED, linestyle="--", linewidth=1.2)
        axes.text(1, level, f"ln V = {level:.2f}", transform=axes.get_yaxis_transform(), ha="right", va="bottom")
    axes.set(xlabel=label("tokens seen", "已见词元数"), ylabel=label("loss (nats per token)", "损失（奈特/词元）"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.margins(x=0.02)
    figure.legend(loc="outside upper center", ncols=len(curves))
    words = [f"{name}{label(*COLON)}{_curve_text(points)}" for name, points in curves.items()]
    show(figure, _joined(words), label("Loss in training", "训练损失"))


def _curve_text(points: Points) -> str:
    first, last = (list(points.values())[i] for i in (0, -1))
    end = f"{max(points):,.0f}"
    return label(f"from {first:.2f} to {last:.2f} after {end} tokens", f"从 {first:.2f} 到 {last:.2f}，共 {end} 个词元")


# ---------- learning rates tried ----------


@styled
def plot_sweep(losses: Points, start: float) -> None:
    """Show the loss that a short run reached with each learning rate.

    Args:
        losses: learning rate -> last loss in nats; one that is not a number is shown where the run began.
        start: the loss before training.
    """
    rates = sorted(losses)
    values = [losses[rate] if math.isfinite(losses[rate]) else start for rate in rates]
    best = min(rates, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)
    figure, axes = new_figure(height=2.8)
    axes.plot(rates, values, "o-", color=BLUE, linewidth=2)
    axes.plot([best], [losses[best]], "o", color=ORANGE, markersize=10)
    axes.axhline(start, color=MUTED, linestyle="--", linewidth=1.2)
    axes.text(rates[len(rates) // 2], start, label("before training", "训练前"), ha="center", va="bottom")
    axes.set(xscale="log", xlabel=label("highest learning rate", "最高学习率"))
    axes.set_ylabel(label("last loss (nats)", "最终损失（奈特）"))
    axes.xaxis.set_major_locator(FixedLocator(rates))
    _plain(axes, "x")
    axes.margins(y=0.15)
    words = [f"{rate:g} → {losses[rate]:.2f}" for rate in rates]
    said = label(f"Best: {best:g}. ", f"最好的是 {best:g}。")
    show(figure, said + _joined(words), label("Last loss by learning rate", "不同学习率下的最终损失"))


# ---------- power law ----------


@styled
def plot_power_law(points: Points, scale: float, exponent: float, span: tuple[float, float]) -> None:
    """Show losses on double logarithmic axes, with the straight line scale * tokens ** -exponent.

    Args:
        points: tokens seen -> nats per token.
        scale, exponent: of the line.
        span: first and last number of tokens that it was fitted to; beyond, it is dashed.
    """
    figure, axes = new_figure()
    places = np.array(sorted(points))
    axes.plot(places, [points[x] for x in places], ".", color=BLUE, markersize=4, label=label("measured", "实测"))
    fitted, whole = np.array(span), np.array([places[0], places[-1]])
    name = label("power law", "幂律")
    axes.plot(whole, scale * whole**-exponent, "--", color=ORANGE, linewidth=1.2)
    axes.plot(fitted, scale * fitted**-exponent, color=ORANGE, linewidth=2.2, label=name)
    axes.set(xscale="log", yscale="log", xlabel=label("tokens seen", "已见词元数"))
    axes.set_ylabel(label("loss (nats per token)", "损失（奈特/词元）"))
    axes.yaxis.set_major_locator(FixedLocator(range(1, 20)))
    _plain(axes, "y")
    figure.legend(loc="outside upper center", ncols=2)
    told = label(
        f"Loss falls along a straight line of slope {-exponent:.3f} between {span[0]:,.0f} and {span[1]:,.0f} tokens; "
        f"the last point is at {points[places[-1]]:.2f}, the line at {scale * places[-1] ** -exponent:.2f}.",
        f"在 {span[0]:,.0f} 到 {span[1]:,.0f} 个词元之间，损失沿斜率 {-exponent:.3f} 的直线下降；"
        f"最后一点为 {points[places[-1]]:.2f}，直线给出 {scale * places[-1] ** -exponent:.2f}。",
    )
    show(figure, told, label("Loss against tokens on logarithmic axes", "双对数坐标下的损失"))


# ---------- bits per byte ----------

TOGETHER = {"English": ("all English", "全部英文"), "Chinese": ("all Chinese", "全部中文")}


@styled
def plot_bits(rows: Mapping[str, Mapping[str, Mapping[str, float]]], models: Sequence[str]) -> None:
    """Show bits per byte by source and model, each with its interval.

    Args:
        rows: source -> model -> {"value", "low", "high"}.
        models: those to draw, in this order.
    """
    figure, axes = new_figure(height=1.2 + 0.3 * len(rows))
    for number, model in enumerate(models):
        places = np.arange(len(rows)) + (number - (len(models) - 1) / 2) * 0.18
        found = [row[model] for row in rows.values()]
        values = np.array([one["value"] for one in found])
        reach = [values - [one["low"] for one in found], [one["high"] for one in found] - values]
        style = {"fmt": "os^D"[number % 4], "color": PALETTE[number % len(PALETTE)], "markersize": 5}
        axes.errorbar(values, places, xerr=np.array(reach), linewidth=2, label=model, **style)
    axes.set_yticks(range(len(rows)), [label(*TOGETHER.get(name, (name, name))) for name in rows], color=INK)
    axes.set(xlim=(0, None), xlabel=label("bits per byte, with 95% intervals", "每字节比特数及 95% 置信区间"))
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=len(models))
    words = [
        f"{label(*TOGETHER.get(name, (name, name)))}{label(*COLON)}"
        + label(*COMMA).join(f"{model} {row[model]['value']:.2f}" for model in models)
        for name, row in rows.items()
    ]
    show(figure, _joined(words), label("Bits per byte of held-out text", "留出文本的每字节比特数"))
