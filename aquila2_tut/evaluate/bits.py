"""Bits per byte: how many bits a model needs to say a text, for each byte that the text has in UTF-8.

A loss per token depends on how long the tokens are; a byte is the same for every vocabulary. So models with
vocabularies of their own, and models that only count, can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from aquila2_tut.data import length_batches
from aquila2_tut.evaluate.errors import EvaluateError
from aquila2_tut.evaluate.intervals import Estimate, bootstrap
from aquila2_tut.longcontext.errors import LongContextError
from aquila2_tut.longcontext.windows import Span, encode_documents, spans

_LOGITS = 1 << 25  # how many a batch may have: 128 MiB in float32


class Bits(NamedTuple):
    """What a model makes of one text."""

    bits: float
    bytes: int


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    window: int = 512,
    stride: int | None = None,
    begin: int | None = None,
) -> list[Bits]:
    """What a model needs for each text; every byte is counted, the token that ends a text is not.

    Args:
        model: any causal language model of transformers.
        tokenizer: its own.
        texts: the documents.
        window: tokens that it reads at once.
        stride: see `spans`; by default half the window.
        begin: the id of the token before each text; by default the tokenizer's bos.

    Returns:
        One entry a text. `interval` makes a figure of them.

    Raises:
        EvaluateError: there is no token to begin with, or the vocabulary cannot say a text.
    """
    begin = tokenizer.bos_token_id if begin is None else begin
    if begin is None:
        raise EvaluateError(
            "the tokenizer has no bos, and the first token of a text must come after something: say begin"
        )
    stride = window // 2 if stride is None else stride
    try:
        rows = encode_documents(tokenizer, texts, begin)
        parts = [(number, span) for number, row in enumerate(rows) for span in spans(len(row), window, stride)]
    except LongContextError as error:
        raise EvaluateError(str(error)) from None
    lengths = [span.end - span.begin for _, span in parts]
    totals = np.zeros(len(rows))
    budget = max(window, _LOGITS // model.config.vocab_size)
    for batch in length_batches(lengths, max_tokens=budget):
        chosen = [parts[index] for index in batch]
        found = _window_bits(model, [(rows[number], span) for number, span in chosen])
        np.add.at(totals, [number for number, _ in chosen], found)
    return [Bits(float(bits), len(text.encode("utf-8"))) for bits, text in zip(totals, texts, strict=True)]


@torch.inference_mode()
def _window_bits(model: PreTrainedModel, windows: Sequence[tuple[list[int], Span]]) -> list[float]:
    """Bits of the tokens that are counted in each window. What fills up stands behind them, where nothing sees it."""
    shape = len(windows), max(span.end - span.begin for _, span in windows)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    for line, (row, span) in enumerate(windows):
        piece = torch.tensor(row[span.begin : span.end])
        ids[line, : len(piece)] = piece
        labels[line, span.first - span.begin : len(piece)] = piece[span.first - span.begin :]
    ids, labels = ids.to(model.device), labels.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return (losses.view(len(windows), -1).double().sum(1) / math.log(2)).tolist()


def interval(found: Sequence[Bits], seed: int = 0) -> Estimate:
    """Bits per byte of all texts together, with an interval that says what other texts of their kind might give.

    Raises:
        EvaluateError: there are no texts.
    """
    bits, sizes = _columns(found)
    return bootstrap(lambda drawn: bits[drawn].sum() / sizes[drawn].sum(), len(found), seed=seed)


def difference(one: Sequence[Bits], other: Sequence[Bits], seed: int = 0) -> Estimate:
    """By how many bits per byte one model needs less (below 0) or more than another, on the same texts.

    The texts are drawn for both at once: so what makes a text hard for either plays no part in the interval, which is
    far narrower than those of the two figures.

    Raises:
        EvaluateError: the texts are not the same.
    """
    bits, sizes = _columns(one)
    others, other_sizes = _columns(other)
    if not np.array_equal(sizes, other_sizes):
        raise EvaluateError("the two measurements are of different texts: compare them on the same ones")
    return bootstrap(lambda drawn: (bits[drawn] - others[drawn]).sum() / sizes[drawn].sum(), len(one), seed=seed)


def _columns(found: Sequence[Bits]) -> tuple[np.ndarray, np.ndarray]:
    """Bits and bytes, (texts,) each."""
    if not all(item.bytes for item in found):
        raise EvaluateError("a text is empty, and has no bits per byte: leave it out")
    return np.array([item.bits for item in found]), np.array([item.bytes for item in found])
