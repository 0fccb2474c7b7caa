"""How a text that is longer than what a model reads at once is cut: into windows that count every token once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from aquila2_tut.longcontext.errors import LongContextError
from aquila2_tut.tokenizer import encode_batch


class Span(NamedTuple):
    """A window of a text: tokens begin to end are read, those from first on are counted, each after all before it."""

    begin: int
    first: int
    end: int


def spans(length: int, window: int, stride: int) -> Iterator[Span]:
    """The windows in which a text is read so that every token but the first is counted once.

    Args:
        length: tokens of the text.
        window: tokens that a model reads at once.
        stride: tokens by which a window goes on; every token but the earliest has window - stride or more before it.

    Raises:
        LongContextError: a stride that is not from 1 to window - 1.
    """
    if not 0 < stride < window:
        raise LongContextError(
            f"the stride must be from 1 to {window - 1}, less than the window of {window}: not {stride}"
        )
    yield Span(0, 1, min(window, length))
    for first in range(window, length, stride):
        end = min(first + stride, length)
        yield Span(end - window, first, end)


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], begin: int) -> list[list[int]]:
    """The ids of texts, each after a token that begins it.

    Raises:
        LongContextError: the vocabulary cannot say a text, so that not every byte of it could be counted.
    """
    found = encode_batch(tokenizer, texts)
    for index, (text, ids) in enumerate(zip(texts, found, strict=True)):
        if tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) != text:
            raise LongContextError(f"text {index} loses something in this vocabulary: leave it out for every model")
    return [[begin, *ids] for ids in found]
