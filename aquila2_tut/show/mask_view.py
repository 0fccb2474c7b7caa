"""A conversation in the notebook, with what is learned from it marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from IPython.display import display

from aquila2_tut.data.masking import mask_pieces, mask_report, show_in_terminal
from aquila2_tut.terminal import UNSAFE

from .plots import label
from .widgets.base import escape

# See-through, so that it lies well on a light page and on a dark one; the line says the same without colour.
_LEARNED = "background: rgb(0 158 115 / 0.22); border-bottom: 2px solid rgb(0 158 115 / 0.9); color: inherit"
_BOX = "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7"


def show_mask(encoded: Mapping[str, Sequence[int]], tokenizer: Any) -> None:
    """Display a conversation; what the model learns to write is marked, the rest it only reads.

    Args:
        encoded: what `aquila2_tut.data.encode_conversation` gave.
        tokenizer: the same as there.
    """
    text = show_in_terminal(encoded, tokenizer, colour=False)
    display({"text/html": mask_html(encoded, tokenizer), "text/plain": text}, raw=True)


def mask_html(encoded: Mapping[str, Sequence[int]], tokenizer: Any) -> str:
    """The conversation as HTML, with a legend in the language of the page; arguments as for `show_mask`."""
    pieces = mask_pieces(encoded, tokenizer)
    body = "".join(_mark(text) if learned else escape(_visible(text)) for text, learned in pieces)
    return f'<div class="mask-view"><div style="{_BOX}">{body}</div><p>{_legend(encoded)}</p></div>'


def _mark(text: str) -> str:
    return f'<mark style="{_LEARNED}">{escape(_visible(text))}</mark>'


def _visible(text: str) -> str:
    """Characters that a page must not hold, or that would turn the direction of writing around, as code points."""
    return UNSAFE.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)


def _legend(encoded: Mapping[str, Sequence[int]]) -> str:
    report = mask_report([encoded])
    share = f"{report.trained_tokens / max(report.tokens, 1):.0%}"
    return label(
        f"{_mark('marked')}: learned, {report.trained_tokens:,} of {report.tokens:,} tokens ({share}); "
        "the rest is only read.",
        f"{_mark('标出的部分')}要学：{report.tokens:,} 个词元中的 {report.trained_tokens:,} 个（{share}）；"
        "其余只读不学。",
    )
