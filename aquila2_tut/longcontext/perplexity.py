"""Bits per byte of long documents: against the position in the text, and against how much of it a model may look back.

The two say different things. What a position costs shows where a model breaks: past the length that it was trained on
its loss climbs, or does not. What a context costs, on the same tokens, shows whether the text further back is of use at
all: a model may be unharmed at position 4,000 and yet read no more than the last 500 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from aquila2_tut.longcontext.errors import LongContextError
from aquila2_tut.longcontext.windows import Span, encode_documents, spans
from aquila2_tut.model import Aquila2ForCausalLM

_AT_ONCE = 256  # tokens whose logits are there at the same time


class Band(NamedTuple):
    """What the tokens from one position to another cost, of all documents together."""

    begin: int
    end: int
    bits: float
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """The figure."""
        return self.bits / self.bytes


class Encoded(NamedTuple):
    """A document's ids, a token that begins it first, and the bytes of each: 0 for the first."""

    ids: list[int]
    sizes: np.ndarray


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Encoded]:
    """Documents as `by_position` and `by_context` take them.

    Args:
        tokenizer: byte-level, with a bos.
        texts: the documents.

    Raises:
        LongContextError: the vocabulary cannot say a text.
    """
    rows = encode_documents(tokenizer, texts, tokenizer.bos_token_id)
    # In a byte-level vocabulary a token is written with one letter a byte.
    return [Encoded(row, np.array([0, *map(len, tokenizer.convert_ids_to_tokens(row[1:]))])) for row in rows]


def by_position(
    model: Aquila2ForCausalLM, documents: Sequence[Encoded], length: int, edges: Sequence[int]
) -> list[Band]:
    """What tokens cost by their position in a document, read from its beginning in one piece.

    Args:
        model: whose positions reach as far.
        documents: those that are shorter than `length` are left out, so that every band is of the same texts.
        length: tokens to read of each.
        edges: positions between two bands, from 1 to `length`; the first token costs nothing, as nothing predicts it.

    Raises:
        LongContextError: no document is as long, or an edge lies outside.
    """
    long_enough = [document for document in documents if len(document.ids) >= length]
    if not long_enough:
        raise LongContextError(f"no document has {length} tokens: give longer ones, or read less of them")
    if any(not 1 < edge < length for edge in edges):
        raise LongContextError(f"edges must lie between 1 and {length}: {list(edges)}")
    whole = Span(0, 1, length)
    costs = sum(token_bits(model, document.ids, whole) for document in long_enough)
    sizes = sum(document.sizes[1:length] for document in long_enough)
    ends = [1, *sorted(edges), length]
    return [
        Band(begin, end, float(costs[begin - 1 : end - 1].sum()), int(sizes[begin - 1 : end - 1].sum()))
        for begin, end in pairwise(ends)
    ]


def by_context(
    model: Aquila2ForCausalLM,
    documents: Sequence[Encoded],
    context: int,
    stride: int | None = None,
    first: int = 1,
    last: int | None = None,
) -> Band:
    """What the same tokens cost when a model reads them in windows, and so looks back as far as one and no further.

    Args:
        model: whose positions reach as far as a window.
        documents: all of them are read.
        context: tokens of a window.
        stride: tokens by which it goes on; by default half of it, so that each token sees that much at least.
        first, last: positions in a document that are counted, `last` not among them.

    Raises:
        LongContextError: a stride that makes no sense, or no token is counted.
    """
    bits, size = 0.0, 0
    for document in documents:
        for span in spans(min(len(document.ids), last or len(document.ids)), context, stride or context // 2):
            if span.end > first:
                counted = Span(span.begin, max(span.first, first), span.end)
                bits += float(token_bits(model, document.ids, counted).sum())
                size += int(document.sizes[counted.first : counted.end].sum())
    if not size:
        raise LongContextError(f"no document has a token at position {first}: give longer ones")
    return Band(first, last or max(len(document.ids) for document in documents), bits, size)


@torch.inference_mode()
def token_bits(model: Aquila2ForCausalLM, ids: Sequence[int], span: Span) -> np.ndarray:
    """Bits of each token that a window counts.

    Args:
        model: reads the window in one piece, and makes few logits at a time.
        ids: of the document.
        span: which tokens are read, and which are counted.

    Returns:
        (span.end - span.first,) float64.
    """
    piece = torch.tensor([ids[span.begin : span.end]], device=model.device)
    labels = piece.clone()
    labels[:, : span.first - span.begin] = -100
    costs = _Costs()
    model(input_ids=piece, labels=labels, head_loss=costs, use_cache=False)
    return costs.bits


class _Costs:
    """Takes the place of a loss in a model's forward pass, and keeps what each token costs."""

    def __call__(self, head: nn.Module, hidden: Tensor, labels: Tensor, num_items_in_batch: object = None) -> Tensor:
        tokens = (labels != -100).nonzero().flatten()
        losses = [
            F.cross_entropy(head(hidden[some]).float(), labels[some], reduction="none")
            for some in tokens.split(_AT_ONCE)
        ]
        total = torch.cat(losses).double() / math.log(2)
        self.bits = total.cpu().numpy()
        return total.sum()
