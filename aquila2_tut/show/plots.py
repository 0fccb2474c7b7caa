"""The book's figures: one style, drawn with matplotlib as SVG whose text stays text.

A figure is not tied to the fonts of the machine that draws it: the browser sets the words, so they can be searched,
read aloud and shown in Chinese. The same bytes come out on every run. When the book is built, each colour named here
becomes a CSS variable, so that figures follow dark mode, and the description given to `show` becomes the alternative
text.
"""

from __future__ import annotations

import functools
import io
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG, RendererSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

P = ParamSpec("P")

INK, MUTED, GRID, PAPER = "#1f2a37", "#5b6776", "#d5dbe3", "#ffffff"
# Source: Okabe and Ito, "Color Universal Design" (2008), a palette for colour-blind and other readers alike.
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
ON_BLUE, ON_COLOUR = "#fefefe", "#111111"  # text on a blue area, and on an area of another colour
PALETTE = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY)

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "aquila2-tut",
    "font.family": "DejaVu Sans",  # only measures the text: see `figure_to_svg`
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}


def page_language() -> str:
    """Return "zh" in a notebook of the Chinese book, "en" elsewhere.

    The environment variable AQUILA2_TUT_LANG decides; else the folder that the notebook runs in does.
    """
    chosen = os.environ.get("AQUILA2_TUT_LANG") or Path.cwd().name
    return "zh" if chosen == "zh" else "en"


def label(en: str, zh: str) -> str:
    """Return the words in the language of the page."""
    return zh if page_language() == "zh" else en


def styled(plot: Callable[P, None]) -> Callable[P, None]:
    """Run a plotting function in the book's style."""

    @functools.wraps(plot)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with matplotlib.rc_context(STYLE):
            plot(*args, **kwargs)

    return run


def new_figure(width: float = 7.4, height: float = 3.2) -> tuple[Figure, Axes]:
    """Return a figure of width x height inches and its axes, known to no backend, so that nothing shows it twice."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def new_panels(count: int, height: float, share_y: bool = False) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure as `new_figure` does, with axes side by side; they may share what is up."""
    figure = Figure(figsize=(7.4, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots(1, count, squeeze=False, sharey=share_y)[0]


@contextmanager
def _wide_characters_measured() -> Iterator[None]:
    """Measure each Chinese character as one em, by a letter that wide.

    matplotlib's own font has no Chinese glyphs: it would warn, and measure the box that stands for a missing glyph.
    """
    measure = RendererSVG.get_text_width_height_descent

    def measured(self: RendererSVG, s: str, *args: Any) -> tuple[float, float, float]:
        return measure(self, "".join("W" if unicodedata.east_asian_width(c) in "WF" else c for c in s), *args)

    RendererSVG.get_text_width_height_descent = measured  # type: ignore[method-assign]
    try:
        yield
    finally:
        RendererSVG.get_text_width_height_descent = measure  # type: ignore[method-assign]


def figure_to_svg(figure: Figure, alt: str = "", title: str = "") -> str:
    """Return the figure as SVG text, the same on every run.

    Args:
        figure: what to draw.
        alt: what a reader who cannot see the figure needs to know; stored in the file as its description.
        title: a short name, stored beside it.
    """
    about = {"Date": None, "Creator": None} | {k: v for k, v in (("Title", title), ("Description", alt)) if v}
    page = io.StringIO()
    with matplotlib.rc_context(STYLE), _wide_characters_measured():
        figure.savefig(page, format="svg", metadata=about)
    svg = page.getvalue()
    return re.sub(r"'DejaVu Sans'(, [^;\"]+)?", "sans-serif", svg[svg.index("<svg") :])


def show(figure: Figure, alt: str, title: str = "") -> None:
    """Display a figure in the notebook.

    Args:
        figure: a matplotlib figure.
        alt: what the figure shows, in the language of the page.
        title: a short name for it.
    """
    display({"image/svg+xml": figure_to_svg(figure, alt, title), "text/plain": "[figure]"}, raw=True)


# ---------- parameter shares ----------

PARTS: tuple[tuple[str, str, str, str], ...] = (  # key of the table, English, Chinese, colour
    ("embedding", "embedding", "嵌入", BLUE),
    ("attention", "attention", "注意力", ORANGE),
    ("feed_forward", "feed-forward", "前馈网络", GREEN),
    ("head", "head", "输出层", PINK),
    ("norms", "norms", "归一化", YELLOW),
)


def count_text(count: int) -> str:
    """Return a number of parameters in words: 7,295,537,152 is "7.30 B" or, in Chinese, "72.96 亿"."""
    if page_language() == "zh":
        return f"{count / 1e8:.2f} 亿"
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.0f} M"


def _draw_shares(axes: Axes, names: Sequence[str], rows: Sequence[Mapping[str, int]]) -> None:
    """Draw one bar a model, cut into the parts' shares, and write the larger shares into it."""
    totals = np.array([sum(row.values()) for row in rows], dtype=float)
    left = np.zeros(len(rows))
    for key, en, zh, colour in PARTS:
        share = np.array([row.get(key, 0) for row in rows]) / totals * 100
        bars = axes.barh(names, share, left=left, color=colour, edgecolor=PAPER, height=0.66, label=label(en, zh))
        words = [f"{s:.0f}%" if s >= 6 else "" for s in share]
        axes.bar_label(bars, words, label_type="center", color=ON_BLUE if colour == BLUE else ON_COLOUR, fontsize=9)
        left += share
    for place, total in enumerate(totals):
        axes.text(101, place, count_text(int(total)), va="center")


def _shares_in_words(name: str, row: Mapping[str, int]) -> str:
    total = sum(row.values())
    parts = [f"{label(en, zh)} {row[key] / total:.1%}" for key, en, zh, _ in PARTS if row.get(key)]
    return f"{name} ({count_text(total)}): " + label(", ", "，").join(parts)


@styled
def plot_parameter_shares(table: Mapping[str, Mapping[str, int]]) -> None:
    """Show where the parameters of each model are, as shares of its total.

    Args:
        table: model name -> {"embedding", "attention", "feed_forward", "head", "norms"} -> number of parameters.

    Raises:
        ValueError: the table is empty, or names a part that is not one of these five.
    """
    known = [part[0] for part in PARTS]
    unknown = {key for row in table.values() for key in row}.difference(known)
    if not table or unknown:
        raise ValueError(f"the table must give {known} for each model; it has {sorted(unknown) or 'no model'}")
    figure, axes = new_figure(height=1.3 + 0.42 * len(table))
    _draw_shares(axes, list(table), list(table.values()))
    axes.set(xlim=(0, 112), xlabel=label("share of all parameters (%)", "占全部参数的比例（%）"))
    axes.set_xticks(range(0, 101, 20))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=len(PARTS), handlelength=1.0, columnspacing=1.4)
    title = label("Where the parameters are", "参数都在哪里")
    show(figure, label("; ", "；").join(_shares_in_words(*item) for item in table.items()), title)


# ---------- rotary embedding ----------


def rope_wavelengths(config: Any) -> np.ndarray:
    """Return, for each pair of components, the number of positions in which its rotation comes full circle.

    Args:
        config: has head_dim D, and rope_parameters with "rope_theta" and for linear scaling "factor".

    Returns:
        (D / 2,) wavelengths in positions.

    Source: Su et al., "RoFormer" (2021), eq. 15; Chen et al., "Extending context window ... interpolation" (2023).
    """
    rope = config.rope_parameters
    stretch = rope["factor"] if rope.get("rope_type") == "linear" else 1.0
    pair = np.arange(config.head_dim // 2)
    return 2 * math.pi * stretch * rope["rope_theta"] ** (2 * pair / config.head_dim)


@styled
def plot_rope(config: Any) -> None:
    """Show how many positions each rotation takes for a full turn, against the positions that the model was trained on.

    Args:
        config: an Aquila2Config, or anything with head_dim, rope_parameters and max_position_embeddings.
    """
    waves, seen = rope_wavelengths(config), config.max_position_embeddings
    whole = int((waves <= seen).sum())
    figure, axes = new_figure()
    axes.semilogy(waves, color=BLUE, linewidth=2)
    axes.fill_between(range(len(waves)), waves, waves[0], where=waves <= seen, color=BLUE, alpha=0.14, linewidth=0)
    axes.axhline(seen, color=ORANGE, linestyle="--", linewidth=1.5)
    axes.text(0, seen * 1.25, label(f"trained on {seen:,} positions", f"训练时见过 {seen:,} 个位置"), color=INK)
    axes.set(
        xlabel=label("pair of components", "分量对的编号"),
        ylabel=label("positions in a full turn", "转一圈经过的位置数"),
    )
    axes.margins(x=0.01)
    show(figure, _rope_in_words(waves, seen, whole), label("Wavelengths of the rotary embedding", "旋转位置编码的波长"))


def _rope_in_words(waves: np.ndarray, seen: int, whole: int) -> str:
    first, last, pairs = waves[0], waves[-1], len(waves)
    return label(
        f"A curve rising from {first:.1f} positions for the first of {pairs} pairs to {last:,.0f} for the last, on a "
        f"logarithmic axis; {whole} pairs turn at least once within the {seen:,} positions seen in training.",
        f"对数坐标上的一条上升曲线：{pairs} 对分量中，第一对每 {first:.1f} 个位置转一圈，最后一对要 {last:,.0f} 个；"
        f"在训练见过的 {seen:,} 个位置之内，有 {whole} 对至少转满一圈。",
    )


# ---------- attention ----------


def len_in_ems(text: str) -> float:
    """Return about how wide a text is set, in ems: a Chinese character is one, a letter about half of one."""
    return sum(1.0 if unicodedata.east_asian_width(c) in "WF" else 0.55 for c in text)


def _cells(axes: Axes, weights: np.ndarray, tokens: Sequence[str]) -> None:
    """Draw each weight as a square whose colour is as strong as the weight, and write the larger ones into it."""
    for (row, column), weight in np.ndenumerate(weights):
        corner, strength = (column - 0.48, row - 0.48), round(0.65 * weight, 3)
        axes.add_patch(Rectangle(corner, 0.96, 0.96, color=BLUE, alpha=strength))
        if weight >= 0.1:
            axes.text(column, row, f"{weight:.1f}".lstrip("0"), ha="center", va="center", fontsize=9)
    upright = max(map(len_in_ems, tokens)) <= 2.6
    axes.set_xticks(range(len(tokens)), tokens, rotation=0 if upright else 90)
    axes.set_yticks(range(len(tokens)), tokens)


@styled
def plot_attention_pattern(weights: Any, tokens: Sequence[str]) -> None:
    """Show how much each token of a short text looks at each token before it, for one head.

    Args:
        weights: (T, T) attention weights, a tensor or an array; row t sums to 1 over the positions that t may see.
        tokens: the T tokens as text.

    Raises:
        ValueError: weights and tokens do not have the same length T.
    """
    grid, names = np.asarray(weights, dtype=float), [t.strip() or "␣" for t in tokens]
    if grid.shape != (len(names), len(names)):
        raise ValueError(f"weights must be (T, T) for T tokens: they are {grid.shape} for {len(names)} tokens")
    side = 1.4 + 0.44 * len(names)
    figure, axes = new_figure(side + 0.6, side)
    _cells(axes, grid, names)
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), aspect="equal")
    axes.set_xlabel(label("token that is looked at", "被看的词元"))
    axes.set_ylabel(label("token that looks", "在看的词元"))
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    show(figure, _pattern_in_words(grid, names), label("Attention of one head", "一个注意力头的权重"))


def _pattern_in_words(grid: np.ndarray, names: list[str]) -> str:
    looks = [f"{name} → {names[int(row.argmax())]} ({row.max():.2f})" for name, row in zip(names, grid, strict=True)]
    intro = label("Where each token looks most: ", "每个词元看得最多的是：")
    return intro + label("; ", "；").join(looks)


# ---------- memory ----------


def _draw_needs(axes: Axes, rows: Sequence[tuple[str, float, float]]) -> None:
    """Draw one bar a row: the weights, and behind them the cache, in GB."""
    places, names = range(len(rows)), [row[0] for row in rows]
    weights, caches = ([row[column] / 1e9 for row in rows] for column in (1, 2))
    axes.barh(places, weights, color=BLUE, height=0.7, label=label("weights", "权重"))
    axes.barh(places, caches, left=weights, color=ORANGE, height=0.7, label=label("cache", "缓存"))
    for place, weight, cache in zip(places, weights, caches, strict=True):
        axes.text(1.01, place, f"{weight + cache:.1f}", va="center", transform=axes.get_yaxis_transform())
    axes.set_yticks(places, names)


@styled
def plot_memory_needs(table: Mapping[str, tuple[float, float, float]], cards: Sequence[int] = ()) -> None:
    """Show what models need for talking: their weights in 16 bits and in NF4, each with a full cache.

    Args:
        table: model name -> bytes of the weights in 16 bits, of the weights in NF4, and of the cache.
        cards: memory of graphics cards in GB, drawn as lines.
    """
    rows = [
        (f"{name}, {kind}", weights, cache)
        for name, (full, nf4, cache) in table.items()
        for kind, weights in ((label("16 bits", "16 位"), full), ("NF4", nf4))
    ]
    figure, axes = new_figure(height=1.2 + 0.3 * len(rows))
    _draw_needs(axes, rows)
    for card in cards:
        axes.axvline(card, color=MUTED, linestyle="--", linewidth=1, zorder=0.5)
    axes.set_xticks([0, *cards, 120])
    axes.set_xlabel(label("GB; dashed: what cards have", "GB；虚线为常见显卡的容量"))
    axes.invert_yaxis()
    axes.grid(visible=False)
    figure.legend(loc="outside upper center", ncols=2)
    words = [f"{name}: {weights / 1e9:.1f} + {cache / 1e9:.1f} GB" for name, weights, cache in rows]
    intro = label("Weights + cache. ", "权重 + 缓存。")
    show(figure, intro + label("; ", "；").join(words), label("Memory for talking", "对话所需的显存"))
