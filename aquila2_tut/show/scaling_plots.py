"""Figures of training on several GPUs: which part of what lies where, and how much it is."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ..memory import SPLIT, Held
from .plots import BLUE, GREEN, MUTED, ORANGE, PAPER, label, new_figure, show, styled

KINDS = (  # fields of `Held`, English, Chinese, colour
    ("weights", "weights", "权重", BLUE),
    ("gradients", "gradients", "梯度", ORANGE),
    ("optimizer", "optimizer", "优化器状态", GREEN),
)
NAMES = {"zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}


def strategy_name(strategy: str) -> str:
    """How a strategy is called in the language of the page."""
    return NAMES.get(strategy) or label("copies", "完整副本")


def _draw_cell(axes: Axes, row: int, device: int, devices: int, split: tuple[bool, ...]) -> None:
    """One device: three columns, a whole one where the device has everything, a slice where it has its share."""
    for place, ((_, _, _, colour), cut) in enumerate(zip(KINDS, split, strict=True)):
        x, height = device + 0.14 + 0.25 * place, 0.8 / devices if cut else 0.8
        y = row + 0.1 + (0.8 * device / devices if cut else 0)
        axes.add_patch(Rectangle((x, row + 0.1), 0.21, 0.8, facecolor="none", edgecolor=MUTED, linewidth=0.6))
        axes.add_patch(Rectangle((x, y), 0.21, height, facecolor=colour, edgecolor=PAPER, linewidth=0.6))


@styled
def plot_placement(strategies: tuple[str, ...], devices: int = 4) -> None:
    """Show which part of weights, gradients and optimizer state lies on each GPU.

    Args:
        strategies: keys of `aquila2_tut.memory.SPLIT`, one a row.
        devices: how many GPUs to draw.
    """
    figure, axes = new_figure(height=1.2 + 0.75 * len(strategies))
    for row, strategy in enumerate(strategies):
        for device in range(devices):
            _draw_cell(axes, row, device, devices, SPLIT[strategy])
    axes.set(xlim=(0, devices), ylim=(len(strategies), 0))
    axes.set_xticks([place + 0.5 for place in range(devices)], [f"GPU {place}" for place in range(devices)])
    axes.set_yticks([row + 0.5 for row in range(len(strategies))], [strategy_name(name) for name in strategies])
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for _, en, zh, colour in KINDS:
        axes.bar([0], [0], color=colour, label=label(en, zh))
    figure.legend(loc="outside upper center", ncols=3)
    words = [f"{strategy_name(name)}{label(': ', '：')}{_placement_text(SPLIT[name])}" for name in strategies]
    show(figure, label("; ", "；").join(words), label("What lies on each GPU", "每张显卡上放着什么"))


def _placement_text(split: tuple[bool, ...]) -> str:
    cut = [label(en, zh) for (_, en, zh, _), part in zip(KINDS, split, strict=True) if part]
    if not cut:
        return label("everything on every GPU", "每张卡上都有全部")
    return label(f"split are {', '.join(cut)}", f"切分的是{'、'.join(cut)}")


@styled
def plot_held(table: Mapping[str, Held], cards: Mapping[str, float]) -> None:
    """Show the bytes of weights, gradients and optimizer state on one GPU.

    Args:
        table: what is trained, and how -> bytes on one GPU.
        cards: name -> bytes, drawn as dashed lines.
    """
    figure, axes = new_figure(height=1.5 + 0.3 * len(table))
    left = [0.0] * len(table)
    for field, en, zh, colour in KINDS:
        sizes = [getattr(held, field) / 1e9 for held in table.values()]
        axes.barh(range(len(table)), sizes, left=left, color=colour, height=0.7, label=label(en, zh))
        left = [one + other for one, other in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axes.text(1.01, place, f"{total:,.1f}", va="center", transform=axes.get_yaxis_transform())
    for name, size in cards.items():
        axes.axvline(size / 1e9, color=MUTED, linestyle="--", linewidth=1, zorder=0.5)
        axes.text(size / 1e9, -0.75, name, ha="center", va="bottom", fontsize=9)
    axes.set_yticks(range(len(table)), list(table))
    axes.set(
        ylim=(len(table) - 0.4, -0.7),
        xlabel=label("GB on one GPU, activations not counted", "每张卡上的 GB 数，不含激活值"),
    )
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=3)
    words = [f"{name}{label(': ', '：')}{held.total / 1e9:,.1f} GB" for name, held in table.items()]
    intro = label("On one GPU: ", "每张卡上：")
    show(figure, intro + label("; ", "；").join(words), label("Bytes on one GPU", "一张显卡上的字节数"))
