"""Batches with little padding: documents packed into rows, or samples of like length put together.

A packed row holds several documents one behind the other. `document_ids` says which token is whose, 1, 2, ... and 0 at
padding; the model takes it, keeps the documents apart and lets the positions of each start at zero. So a document reads
the same in a row with others as it does alone, and no separator between them has to be learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .masking import IGNORED
from .readers import DataError

Sample = Mapping[str, Sequence[int]]
_Piece = tuple[np.ndarray, np.ndarray]  # token ids and labels of one document, or of a part of it


class Row(NamedTuple):
    """Documents one behind the other, n tokens together: three arrays of (n,) int32.

    `labels` stand at the tokens that they name (the loss shifts them), and are -100 where there is no loss: at the
    first token of each document too, which nothing predicts. `document_ids` are 1, 2, ...
    """

    input_ids: np.ndarray
    labels: np.ndarray
    document_ids: np.ndarray


def pack_stream(sequences: Iterable[Sequence[int]], length: int) -> Iterator[Row]:
    """Packs texts for pretraining: one behind the other, cut where a row is full, so that all rows but the last are.

    The rest of a cut document begins the next row, as a document of its own.

    Args:
        sequences: the token ids of each document, with whatever marks its end.
        length: tokens a row.

    Returns:
        The rows, made while they are asked for.

    Raises:
        DataError: `length` is less than 1.
    """
    _require_positive("length", length)
    pieces: list[_Piece] = []
    room = length
    for sequence in sequences:
        rest = np.asarray(sequence, dtype=np.int32)
        while len(rest):
            piece, rest = rest[:room], rest[room:]
            pieces.append((piece, piece))
            room -= len(piece)
            if not room:
                yield _row(pieces)
                pieces, room = [], length
    if pieces:
        yield _row(pieces)


def pack_best_fit(samples: Sequence[Sample], length: int) -> list[Row]:
    """Packs samples for fine-tuning: each stays whole, and goes where it leaves the least room.

    Args:
        samples: `input_ids` and `labels` of each.
        length: the most tokens a row may have; most rows come close to it, and `collate` pads what is missing.

    Returns:
        The rows, those with the longest samples first: shuffle them.

    Raises:
        DataError: a sample that is longer than a row, empty, or has not as many labels as tokens.
    """
    pieces = [_piece(sample, index) for index, sample in enumerate(samples)]
    return [_row([pieces[i] for i in chosen]) for chosen in _best_fit([len(ids) for ids, _ in pieces], length)]


def _best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest row that still has room for it.

    Needs at most 11/9 of the fewest rows possible, and a few more.

    Source: Johnson et al. 1974 (doi 10.1137/0203025).
    """
    _require_positive("length", length)
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the tokens that still fit in
    rooms = 0  # bit r is set where with_room[r] is not empty, so that the least room that is enough is one bit away
    for index in np.argsort(-np.asarray(sizes, dtype=np.int64), kind="stable").tolist():
        size = sizes[index]
        if size > length:
            raise DataError(f"sample {index} has {size} tokens, more than the {length} of a row: cut it, or pack wider")
        enough = rooms >> size
        room = size + (enough & -enough).bit_length() - 1 if enough else length
        if enough:
            row = with_room[room].pop()
            rooms ^= 0 if with_room[room] else 1 << room
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(index)
        with_room[room - size].append(row)
        rooms |= 1 << (room - size)
    return rows


def _piece(sample: Sample, index: int) -> _Piece:
    """The arrays of a sample, checked."""
    ids, labels = (np.asarray(sample[name], dtype=np.int32) for name in ("input_ids", "labels"))
    if not len(ids):
        raise DataError(f"sample {index} has no tokens: leave it out")
    if len(ids) != len(labels):
        raise DataError(
            f"sample {index} has {len(ids)} input_ids but {len(labels)} labels: one label a token is needed"
        )
    return ids, labels


def _row(pieces: Sequence[_Piece]) -> Row:
    """Joins documents, and takes the label from the first token of each."""
    sizes = [len(ids) for ids, _ in pieces]
    labels = np.concatenate([labels for _, labels in pieces])
    labels[np.cumsum([0, *sizes[:-1]])] = IGNORED
    numbers = np.arange(1, len(pieces) + 1, dtype=np.int32)
    return Row(np.concatenate([ids for ids, _ in pieces]), labels, np.repeat(numbers, sizes))


def length_batches(
    lengths: Sequence[int], *, batch_size: int | None = None, max_tokens: int | None = None, seed: int = 0
) -> list[list[int]]:
    """Batches of samples of like length, in an order of chance.

    Which of two samples of one length comes first is up to chance too, so that another seed mixes the batches anew.

    Args:
        lengths: tokens of each sample.
        batch_size: samples a batch; or
        max_tokens: the most tokens a batch may have, padding included.
        seed: of the order.

    Returns:
        Indices of samples, one list a batch; each index once.

    Raises:
        DataError: not exactly one limit is given, it is less than 1, or a sample is longer than `max_tokens`.
    """
    if (batch_size is None) == (max_tokens is None):
        raise DataError("give exactly one of batch_size and max_tokens")
    _require_positive("batch_size" if max_tokens is None else "max_tokens", batch_size or max_tokens or 0)
    chance, sizes = np.random.default_rng(seed), np.asarray(lengths, dtype=np.int64)
    order = chance.permutation(len(sizes))
    order = order[np.argsort(sizes[order], kind="stable")].tolist()
    if batch_size is not None:
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    else:
        batches = _within(order, lengths, max_tokens)
    return [batches[i] for i in chance.permutation(len(batches))]


def _within(order: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cuts indices, shortest sample first, into batches of at most `max_tokens` with padding."""
    batches: list[list[int]] = []
    for index in order:
        if lengths[index] > max_tokens:
            raise DataError(f"sample {index} has {lengths[index]} tokens, more than max_tokens={max_tokens}: cut it")
        if not batches or (len(batches[-1]) + 1) * lengths[index] > max_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def collate(items: Sequence[Row | Sample], pad_id: int) -> dict[str, Tensor]:
    """Makes a batch: pads on the right, to the longest.

    Args:
        items: B packed rows, or B samples with `input_ids` and `labels`.
        pad_id: the token that fills up; nothing sees it.

    Returns:
        `input_ids`, `labels` and `document_ids`, (B, T) int64 each, as `Aquila2ForCausalLM.forward` takes them.

    Raises:
        DataError: there are no items, or a sample is empty or has not as many labels as tokens.
    """
    if not items:
        raise DataError("a batch needs at least one row or sample")
    rows = [item if isinstance(item, Row) else _row([_piece(item, index)]) for index, item in enumerate(items)]
    shape = len(rows), max(len(row.input_ids) for row in rows)
    batch = {}
    for name, filler in zip(Row._fields, (pad_id, IGNORED, 0), strict=True):
        table = np.full(shape, filler, dtype=np.int64)
        for line, row in zip(table, rows, strict=True):
            line[: len(row.input_ids)] = getattr(row, name)
        batch[name] = torch.from_numpy(table)
    return batch


def padding_share(lengths: Sequence[int], *, length: int, batch_size: int, seed: int = 0) -> dict[str, float]:
    """How much of what a model computes is padding, in four ways of making batches.

    Args:
        lengths: tokens of each sample, none above `length`.
        length: tokens of a full row.
        batch_size: samples a batch.
        seed: of the order of chance.

    Returns:
        From 0 to 1: `full` pads every sample to `length`, `random` to the longest of its batch, `bucketed` does so in
        batches of like length, `packed` pads packed rows to `length`.

    Raises:
        DataError: there are no tokens, or a sample is longer than `length`.
    """
    if not sum(lengths):
        raise DataError("without a token there is no share of padding")
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    batches = {
        "random": [order[i : i + batch_size] for i in range(0, len(order), batch_size)],
        "bucketed": length_batches(lengths, batch_size=batch_size, seed=seed),
    }
    computed = {"full": len(lengths) * length}
    for name, made in batches.items():
        computed[name] = sum(len(batch) * max(lengths[i] for i in batch) for batch in made)
    computed["packed"] = len(_best_fit(lengths, length)) * length
    return {name: 1 - sum(lengths) / tokens for name, tokens in computed.items()}


def _require_positive(name: str, number: int) -> None:
    if number < 1:
        raise DataError(f"{name} must be at least 1, not {number}")
