"""Figures about vocabularies: how a token grows, what a vocabulary holds, how far it compresses a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from aquila2_tut.tokenizer.bpe import to_bytes, to_letters

from .plots import (
    BLUE,
    GREEN,
    GRID,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    PINK,
    SKY,
    YELLOW,
    label,
    new_figure,
    new_panels,
    show,
    styled,
)

# ---------- how a token grows ----------


class Node(NamedTuple):
    """One token in the tree of merges: its letters, where it is drawn, and the nodes it was merged from."""

    token: str
    x: float
    y: int
    parts: tuple[Node, ...] = ()


def grow_tree(token: str, merges: Mapping[str, tuple[str, str]], first: int = 0) -> Node:
    """The merges that made a token, as a tree whose leaves, the bytes, stand side by side from place `first` on.

    Args:
        token: in the letters of vocabulary files.
        merges: for each merged token its two parts.
        first: place of its first byte.
    """
    if token not in merges:
        return Node(token, first, 0)
    left, right = merges[token]
    parts = (grow_tree(left, merges, first), grow_tree(right, merges, first + len(left)))
    return Node(token, (parts[0].x + parts[1].x) / 2, 1 + max(part.y for part in parts), parts)


def _draw_node(axes: Axes, node: Node, vocab: Mapping[str, int]) -> None:
    """Draw a token, the lines to its parts, and then the parts."""
    for part in node.parts:  # the boxes are see-through, as is the page in dark mode: lines end at their edges
        below, above = node.y - 0.31, part.y + (0.31 if part.parts else 0.2)
        axes.plot([node.x, part.x], [below, above], color=MUTED, linewidth=1)
        _draw_node(axes, part, vocab)
    words = _token_text(to_bytes(node.token))
    if node.parts:
        words += f"\n{vocab[node.token]}"
    box = {
        "boxstyle": "round,pad=0.25",
        "facecolor": PAPER,
        "edgecolor": BLUE if node.parts else GRID,
        "linewidth": 1.2,
    }
    axes.text(node.x, node.y, words, ha="center", va="center", fontsize=8.5, linespacing=1.35, bbox=box)


def _token_text(data: bytes) -> str:
    """A token as text, or in hex if it is no whole character; a space at its beginning can be seen."""
    try:
        return data.decode().replace(" ", "␣")
    except UnicodeDecodeError:
        return data.hex(" ").upper()


@styled
def plot_merge_tree(token: str, encoding: Any) -> None:
    """Show how a token was put together from its bytes, merge by merge, with the ids of what came out.

    Args:
        token: a text that is one token.
        encoding: a `BytePairEncoding`.

    Raises:
        ValueError: the text is more than one token.
    """
    letters = to_letters(token.encode())
    if letters not in encoding.vocab:
        raise ValueError(f"{token!r} is {len(encoding.encode(token))} tokens: a tree shows how one token grew")
    tree = grow_tree(letters, {left + right: (left, right) for left, right in encoding.merges})
    figure, axes = new_figure(width=min(9.0, 1 + 0.62 * len(letters)), height=0.7 + 0.62 * tree.y)
    _draw_node(axes, tree, encoding.vocab)
    axes.set(xlim=(-0.6, len(letters) - 0.4), ylim=(-0.5, tree.y + 0.5))
    axes.axis("off")
    show(figure, _tree_in_words(token, tree, encoding.vocab), label("How a token grew", "一个词元的由来"))


def _tree_in_words(token: str, tree: Node, vocab: Mapping[str, int]) -> str:
    def inner(node: Node) -> list[Node]:
        return [found for part in node.parts for found in inner(part)] + ([node] if node.parts else [])

    steps = [
        f"{' + '.join(_token_text(to_bytes(part.token)) for part in node.parts)} = {vocab[node.token]}"
        for node in sorted(inner(tree), key=lambda node: vocab[node.token])
    ]
    said = label("; ", "；").join(steps)
    return label(f"A tree from bytes to “{token}”, by these merges: {said}.", f"从字节到“{token}”的合并树：{said}。")


# ---------- what a vocabulary holds ----------

KINDS: tuple[tuple[str, str, str, str], ...] = (  # key, English, Chinese, colour
    ("chinese", "Chinese", "中文", ORANGE),
    ("english", "Latin letters", "拉丁字母", BLUE),
    ("digits", "digits", "数字", GREEN),
    ("signs", "signs, white space", "符号与空白", YELLOW),
    ("letters", "other scripts", "其他文字", PINK),
    ("parts", "parts of characters", "字符的片段", SKY),
)


@styled
def plot_vocabulary_kinds(blocks: Sequence[Mapping[str, int]], size: int) -> None:
    """Show what the tokens of a vocabulary are, block by block of ids: early ids were learned first.

    Args:
        blocks: for each block, how many tokens are "chinese", "english", "digits", "signs", "letters", "parts".
        size: ids in a block.

    Raises:
        ValueError: a block has a kind that is not one of these.
    """
    if unknown := {kind for block in blocks for kind in block} - {kind[0] for kind in KINDS}:
        raise ValueError(f"the kinds of tokens are {[kind[0] for kind in KINDS]}; unknown: {sorted(unknown)}")
    figure, axes = new_figure(height=3.4)
    places, base = range(len(blocks)), [0.0] * len(blocks)
    for key, en, zh, colour in KINDS:
        share = [100 * block.get(key, 0) / sum(block.values()) for block in blocks]
        axes.bar(places, share, bottom=base, color=colour, edgecolor=PAPER, width=0.9, label=label(en, zh))
        base = [low + more for low, more in zip(base, share, strict=True)]
    axes.set_xticks(places, [f"{place * size / 1000:.0f}k" for place in places])
    axes.set(ylim=(0, 100), xlabel=label("ids from", "编号起点"), ylabel=label("share of tokens (%)", "占比（%）"))
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside upper center", ncols=3, handlelength=1.0, columnspacing=1.4)
    show(figure, _kinds_in_words(blocks, size), label("What the vocabulary holds", "词表里有什么"))


def _kinds_in_words(blocks: Sequence[Mapping[str, int]], size: int) -> str:
    said = []
    for place in (0, len(blocks) - 1):
        whole = sum(blocks[place].values())
        parts = [f"{label(en, zh)} {blocks[place].get(key, 0) / whole:.0%}" for key, en, zh, _ in KINDS]
        said.append(label("ids from ", "编号从 ") + f"{place * size:,}" + label(": ", "起：") + ", ".join(parts))
    return label("Stacked bars, one for each block of ids; ", "每段编号一根堆叠柱；") + label("; ", "；").join(said)


# ---------- how far a text is compressed ----------

TRAINED: dict[str, tuple[str, str, str, str]] = {  # name -> Chinese name, colour, line, marker
    "byte-level BPE": ("字节级 BPE", BLUE, "-", "o"),
    "SentencePiece BPE": ("SentencePiece BPE", ORANGE, "--", "s"),
    "SentencePiece unigram": ("SentencePiece unigram", GREEN, ":", "^"),
}


@styled
def plot_size_knob(results: Sequence[Any], reference: Any) -> None:
    """Show characters a token against the size of the vocabulary, English and Chinese side by side.

    Args:
        results: `Parallel` measurements of trained tokenizers, of any kinds and sizes.
        reference: the `Parallel` measurement of another tokenizer on the same sentences, drawn as a line.
    """
    figure, panels = new_panels(2, 3.3)
    titles = label("English", "英文"), label("Chinese", "中文")
    for axes, language, title in zip(panels, ("english", "chinese"), titles, strict=True):
        _draw_knob(axes, results, language)
        axes.axhline(getattr(reference, language).characters_per_token, color=MUTED, linestyle="-.", linewidth=1.2)
        axes.set_title(title, fontsize=10.5)
        axes.set_xlabel(label("tokens in the vocabulary", "词表大小"))
    figure.axes[0].set_ylabel(label("characters per token", "每个词元的字符数"))
    figure.axes[0].lines[-1].set_label(reference.tokenizer)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    show(
        figure, _knob_in_words([*results, reference]), label("Compression against vocabulary size", "词表大小与压缩率")
    )


def _draw_knob(axes: Axes, results: Sequence[Any], language: str) -> None:
    for name, (chinese, colour, line, marker) in TRAINED.items():
        rows = sorted((r for r in results if r.tokenizer == name), key=lambda r: r.english.vocab_size)
        sizes = [row.english.vocab_size for row in rows]
        values = [getattr(row, language).characters_per_token for row in rows]
        words = label(name, chinese)
        axes.semilogx(sizes, values, color=colour, linestyle=line, marker=marker, markersize=5, label=words)
    seen = sorted({2 ** round(math.log2(row.english.vocab_size)) for row in results})
    axes.xaxis.set_major_locator(FixedLocator(seen))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(axis="x", labelsize=9)
    axes.set_ylim(bottom=0)


def _knob_in_words(results: Sequence[Any]) -> str:
    rows = [
        f"{r.tokenizer} {r.english.vocab_size:,}: {r.english.characters_per_token:.2f}, "
        f"{r.chinese.characters_per_token:.2f}"
        for r in results
    ]
    intro = label("Characters per token, English and Chinese. ", "每个词元的字符数，先英文后中文。")
    return intro + label("; ", "；").join(rows)


# ---------- the vocabularies of many models ----------


@styled
def plot_tokenizers(results: Sequence[Any], highlight: str = "Aquila") -> None:
    """Show how many Chinese tokens it takes to say what one English token says, for each tokenizer.

    Args:
        results: `Parallel` measurements on the same sentences.
        highlight: the tokenizer whose bar is coloured.
    """
    rows = sorted(results, key=lambda row: row.ratio)
    figure, axes = new_figure(height=1.1 + 0.31 * len(rows))
    colours = [ORANGE if row.tokenizer == highlight else BLUE for row in rows]
    axes.barh([row.tokenizer for row in rows], [row.ratio for row in rows], color=colours, height=0.66)
    axes.axvline(1, color=INK, linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.grid(visible=False)
    _write_columns(axes, rows, edge=0.5 * math.ceil(2 * rows[-1].ratio))
    axes.set_xlabel(
        label("Chinese tokens for one English token, same sentences", "同样的句子，中文词元数 ÷ 英文词元数")
    )
    show(figure, _tokenizers_in_words(rows), label("What the same sentences cost", "同样的句子要多少词元"))


def _write_columns(axes: Axes, rows: Sequence[Any], edge: float) -> None:
    """Write the figures behind the bars, which end at `edge`, as the columns of a table."""
    heads = (label("ratio", "比值"), label("tokens", "词表"), label("en", "英文"), label("zh", "中文"))
    places = [edge * part for part in (1.08, 1.28, 1.41, 1.53)]
    axes.set_xlim(0, places[-1])
    axes.set_xticks([tick / 2 for tick in range(int(2 * edge) + 1)])
    axes.spines.bottom.set_bounds(0, edge)
    lines = [(f"{r.ratio:.2f}", f"{r.english.vocab_size:,}", *_each(r)) for r in rows]
    for at, line in enumerate([heads, *lines], start=-1):
        for place, words in zip(places, line, strict=True):
            axes.text(place, at, words, ha="right", va="center", fontsize=9, color=MUTED if at < 0 else INK)


def _each(row: Any) -> tuple[str, str]:
    return f"{row.english.characters_per_token:.2f}", f"{row.chinese.characters_per_token:.2f}"


def _tokenizers_in_words(rows: Sequence[Any]) -> str:
    said = [f"{row.tokenizer} {row.ratio:.2f}" for row in rows]
    intro = label("Chinese tokens for one English token: ", "中文词元数与英文词元数之比：")
    return intro + label("; ", "；").join(said)
