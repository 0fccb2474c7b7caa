"""Figures of LoRA against Q-LoRA: memory and time over the length of a row, and a published table beside rehearsals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .plots import BLUE, GREEN, INK, MUTED, ON_BLUE, ON_COLOUR, ORANGE, label, new_figure, show, styled

Pair = Mapping[str, Mapping[str, float]]  # "lora" and "qlora" -> "peak" in bytes, "seconds" a step
_NAMES = {"lora": "LoRA", "qlora": "Q-LoRA"}
_COLOURS = {"lora": BLUE, "qlora": ORANGE}


def _lengths(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(lengths)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize="small")
    axes.set(xlabel=label("tokens a row", "每行词元数"))


def _draw_memory(axes: Axes, rows: Mapping[int, Pair]) -> None:
    lengths = list(rows)
    peaks = {name: [row[name]["peak"] / 1e9 for row in rows.values()] for name in _NAMES}
    axes.fill_between(lengths, peaks["qlora"], peaks["lora"], color=MUTED, alpha=0.15, linewidth=0)
    for name, values in peaks.items():
        axes.plot(lengths, values, "o-", color=_COLOURS[name], markersize=4, label=_NAMES[name])
    _lengths(axes, lengths)
    axes.set(ylim=(0, 1.15 * max(peaks["lora"])), title=label("memory, GB", "内存（GB）"))
    axes.legend(loc="upper left", ncols=2, fontsize="small")


def _draw_time(axes: Axes, rows: Mapping[int, Pair], penalty: float | None) -> None:
    lengths = list(rows)
    ratios = [row["qlora"]["seconds"] / row["lora"]["seconds"] for row in rows.values()]
    if penalty is not None:
        derived = [1 + penalty / row["lora"]["seconds"] for row in rows.values()]
        axes.plot(lengths, derived, "--", color=INK, linewidth=1.2, label=label("derived", "推算"))
    axes.plot(lengths, ratios, "o", color=GREEN, markersize=6)
    for length, ratio in zip(lengths, ratios, strict=True):
        axes.annotate(f"{ratio:.2f}", (length, ratio), (4, 5), textcoords="offset points", fontsize="small")
    axes.axhline(1, color=MUTED, linewidth=1)
    _lengths(axes, lengths)
    title = label("time of Q-LoRA, LoRA being 1", "Q-LoRA 的用时（以 LoRA 为 1）")
    axes.set(ylim=(0.9, 0.15 + max(ratios) * 1.08), title=title)
    if penalty is not None:
        axes.legend(loc="upper right", fontsize="small")


@styled
def plot_lengths(rows: Mapping[int, Pair], penalty: float | None = None) -> None:
    """Show memory of both methods, and how much longer a step of Q-LoRA takes, over the tokens of a row.

    Args:
        rows: tokens -> "lora" and "qlora" -> "peak" in bytes and "seconds" a step.
        penalty: seconds that each step of Q-LoRA takes longer, by derivation.
    """
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    memory, time = figure.subplots(1, 2)
    _draw_memory(memory, rows)
    _draw_time(time, rows, penalty)
    words = label("; ", "；").join(_in_words(length, row) for length, row in rows.items())
    show(figure, words, label("LoRA and Q-LoRA over the length of a row", "LoRA 与 Q-LoRA 随行长的变化"))


def _in_words(length: int, row: Pair) -> str:
    first, other = (row[name]["peak"] / 1e9 for name in _NAMES)
    ratio = row["qlora"]["seconds"] / row["lora"]["seconds"]
    return label(
        f"{length} tokens: LoRA {first:.2f} GB, Q-LoRA {other:.2f} GB, which takes {ratio:.2f} times as long",
        f"{length} 个词元：LoRA {first:.2f} GB，Q-LoRA {other:.2f} GB，用时是前者的 {ratio:.2f} 倍",
    )


@styled
def plot_published(rows: Mapping[str, tuple[float, float, bool]]) -> None:
    """Show published memory beside what a rehearsal says, and which of the published runs cannot have been.

    Args:
        rows: name -> (published, rehearsed, possible), in bytes.
    """
    figure, axes = new_figure(height=1.3 + 0.5 * len(rows))
    places = range(len(rows))
    found = [rehearsed / 1e9 for _, rehearsed, _ in rows.values()]
    colours = [BLUE if possible else ORANGE for *_, possible in rows.values()]
    bars = axes.barh(places, found, 0.55, color=colours)
    texts = axes.bar_label(bars, [f"{value:.1f}" for value in found], label_type="center")
    for text, (*_, possible) in zip(texts, rows.values(), strict=True):
        text.set_color(ON_BLUE if possible else ON_COLOUR)
    for place, (published, *_) in zip(places, rows.values(), strict=True):
        axes.plot([published / 1e9] * 2, [place - 0.4, place + 0.4], color=INK, linewidth=3)
    axes.set_yticks(places, list(rows))
    axes.set(
        xlim=(0, 1.2 * max(found)), xlabel=label("GB; the black mark is what was published", "GB；黑线是公布的数字")
    )
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    words = label("; ", "；").join(_row_words(name, *row) for name, row in rows.items())
    show(figure, words, label("Published memory and rehearsals", "公布的内存与预演"))


def _row_words(name: str, published: float, rehearsed: float, possible: bool) -> str:
    end = "" if possible else label(", too slow a card for the time printed", "，按公布的用时，显卡来不及")
    return (
        label(
            f"{name}: {published / 1e9:.1f} GB published, {rehearsed / 1e9:.1f} rehearsed",
            f"{name}：公布 {published / 1e9:.1f} GB，预演 {rehearsed / 1e9:.1f} GB",
        )
        + end
    )


def table_rows(table: Sequence[Mapping[str, Any]]) -> dict[int, Pair]:
    """The rows of a table by their tokens, as `plot_lengths` takes them.

    Args:
        table: "lengths" of `aquila2_tut.memory.compared.compared`.
    """
    return {int(row["tokens"]): {name: row[name] for name in _NAMES} for row in table}


_MAPS = {"q+v": (ORANGE, "^"), "attention": (GREEN, "s"), "all": (BLUE, "o")}
Place = tuple[str, int]  # the maps that have adapters, and their rank


def _maps_name(maps: str) -> str:
    return {"all": label("all maps", "全部线性变换"), "attention": label("attention", "注意力")}.get(maps, maps)


def _by_place(rows: Sequence[Mapping[str, Any]], bits: int) -> dict[Place, Mapping[str, Any]]:
    return {(row["maps"], row["r"]): row for row in rows if row["bits"] == bits}


def _draw_losses(axes: Axes, rows: Mapping[Place, Mapping[str, Any]]) -> None:
    """A line for each choice of maps over the parameters trained, a small dot for each seed."""
    for maps, (colour, marker) in _MAPS.items():
        own = sorted((row for (name, _), row in rows.items() if name == maps), key=lambda row: row["r"])
        sizes = [row["trained"] for row in own]
        axes.plot(sizes, [row["loss"]["value"] for row in own], color=colour, marker=marker, label=_maps_name(maps))
        for row in own:
            axes.plot([row["trained"]] * len(row["runs"]), [run["loss"] for run in row["runs"]], ".", color=INK, ms=3)
            place = row["trained"], max(run["loss"] for run in row["runs"])
            axes.annotate(f"{row['r']}", place, (0, 5), textcoords="offset points", ha="center", fontsize="small")
    axes.set_xscale("log")
    axes.margins(0.12)
    axes.set(xlabel=label("parameters trained (numbers: rank)", "训练的参数（数字：秩）"))
    axes.set_title(label("held-out loss, nats", "留出数据的损失（nat）"))
    axes.legend(fontsize="small")


def loss_differences(rows: Sequence[Mapping[str, Any]], bits: int = 4) -> dict[Place, list[float]]:
    """How much more the loss is over weights of fewer bits, seed by seed, in nats.

    Args:
        rows: of `aquila2_tut.train.published.measured_sweep`.
        bits: of the weights; those of 32 bits are compared with.

    Returns:
        (maps, rank) -> a difference for each seed that both have.
    """
    few, full = _by_place(rows, bits), _by_place(rows, 32)
    found = {}
    for place in few.keys() & full.keys():
        other = {run["seed"]: run["loss"] for run in full[place]["runs"]}
        runs = [run for run in few[place]["runs"] if run["seed"] in other]
        found[place] = [run["loss"] - other[run["seed"]] for run in runs]
    return {place: found[place] for place in full if place in found}


def _draw_differences(axes: Axes, differences: Mapping[Place, Sequence[float]]) -> None:
    for height, ((maps, _), values) in enumerate(differences.items()):
        colour, marker = _MAPS[maps]
        axes.plot(values, [height] * len(values), marker, color=colour, markersize=5, alpha=0.8)
    axes.axvline(0, color=MUTED, linewidth=1)
    names = [f"{_maps_name(maps)}, {rank}" for maps, rank in differences]
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize="small")
    axes.set_title(label("loss with NF4 minus loss without", "NF4 的损失减去不量化的损失"))
    axes.set_xlabel(label("nats; a mark is a seed", "nat；每个标记是一个种子"))


@styled
def plot_adapters(rows: Sequence[Mapping[str, Any]]) -> None:
    """Show held-out loss over rank and maps, and seed by seed what weights of four bits change in it.

    Args:
        rows: of `aquila2_tut.train.published.measured_sweep`.
    """
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    FigureCanvasSVG(figure)
    losses, differences = figure.subplots(1, 2, width_ratios=(1.15, 1))
    full = _by_place(rows, 32)
    _draw_losses(losses, full)
    _draw_differences(differences, loss_differences(rows))
    words = label("; ", "；").join(_place_words(*item) for item in full.items())
    words += label(". With NF4 instead: ", "。换成 NF4，相差：")
    words += label("; ", "；").join(_difference_words(*item) for item in loss_differences(rows).items())
    show(figure, words, label("Loss over rank, maps and bits", "损失随秩、目标和位数的变化"))


def _place_words(place: Place, row: Mapping[str, Any]) -> str:
    loss = row["loss"]["value"]
    return f"{_maps_name(place[0])}, " + label(f"rank {place[1]}: {loss:.3f}", f"秩 {place[1]}：{loss:.3f}")


def _difference_words(place: Place, values: Sequence[float]) -> str:
    return f"{_maps_name(place[0])}, {place[1]}: " + ", ".join(f"{value:+.3f}" for value in values)
