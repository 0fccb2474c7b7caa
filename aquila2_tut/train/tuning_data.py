"""From a file of conversations to what a fine-tuning run learns from and is evaluated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..assets import shipped
from ..chat.templates import Template
from ..data.conversations import read_conversations
from ..data.masking import IGNORED, encode_conversation, show_in_terminal
from ..data.packing import Row, pack_best_fit
from .errors import TrainError
from .tuning import Tuning


@dataclass(frozen=True)
class TuningData:
    """What is learned from and what is evaluated on, with the figures of it.

    Attributes:
        train, held_out: rows.
        samples: conversations in `train` and in `held_out`.
        tokens: in `train`.
        learned: those of them that have a label.
        cut: conversations that were cut off at the length of a row.
        lost: conversations of which nothing to learn was left.
        fingerprint: of the files.
    """

    train: list[Row]
    held_out: list[Row]
    samples: tuple[int, int]
    tokens: int
    learned: int
    cut: int
    lost: int
    fingerprint: str


def tuning_data(recipe: Tuning, tokenizer: PreTrainedTokenizerBase, template: Template) -> TuningData:
    """Reads, checks, encodes, splits and packs the conversations of a recipe.

    Args:
        recipe: names the files, the length of a row and what is held out.
        tokenizer: of the model.
        template: of the model.

    Raises:
        DataError: a sample that is wrong, with its file and line.
        TrainError: a file that is not there, or nothing to learn.
    """
    files = data_files(recipe)
    train, held_out = _split([list(read_conversations(file)) for file in files], recipe)
    encoded = [_Encoded.of(part, tokenizer, template, recipe.length) for part in (train, held_out)]
    for name, part in zip(("data", "eval_data"), encoded, strict=True):
        if not train and recipe.eval_share:
            raise TrainError(f"eval_share: all conversations of {recipe.data} are held out: give more, or set it to 0")
        if not part.samples and (name == "data" or recipe.evaluates):
            raise TrainError(
                f"{name}: no conversation is left to learn from: give more, or raise length={recipe.length}"
            )
    rows = [part.rows(recipe) for part in encoded]
    return TuningData(
        *rows,
        samples=(len(encoded[0].samples), len(encoded[1].samples)),
        tokens=sum(len(row.input_ids) for row in rows[0]),
        learned=sum(int((row.labels != IGNORED).sum()) for row in rows[0]),
        cut=sum(part.cut for part in encoded),
        lost=sum(part.lost for part in encoded),
        fingerprint=sha256(b"".join(sha256(file.read_bytes()).digest() for file in files)).hexdigest(),
    )


def data_files(recipe: Tuning) -> list[Path]:
    """The file to learn from and, if there is one, that to be evaluated on: one's own, or one of the book's samples.

    Raises:
        TrainError: one of them is not there.
    """
    return [_file(field, getattr(recipe, field)) for field in ("data", "eval_data") if getattr(recipe, field)]


def _file(field: str, name: str) -> Path:
    own, sample = Path(name).expanduser(), (shipped("samples") or Path()) / name
    if own.is_dir():
        raise TrainError(f"{field}: {name} is a folder, and a file of conversations is needed")
    if not own.is_file() and not sample.is_file():
        option = "--data FILE" if field == "data" else "--set eval_data=FILE"
        raise TrainError(f"{field}: there is no file {name} here in {Path.cwd()}: name yours with {option}")
    return own if own.is_file() else sample


def _split(files: list[list[Any]], recipe: Tuning) -> tuple[list[Any], list[Any]]:
    """What is learned from, and what is held out: the second file, or a share of the first, at least one sample."""
    if len(files) == 2:
        return files[0], files[1]
    samples = list(files[0])
    Random(recipe.seed).shuffle(samples)
    count = max(1, round(len(samples) * recipe.eval_share)) if recipe.eval_share else 0
    return samples[count:], samples[:count]


@dataclass(frozen=True)
class _Encoded:
    samples: list[dict[str, list[int]]]
    cut: int
    lost: int

    @staticmethod
    def of(
        samples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, template: Template, length: int
    ) -> _Encoded:
        """Encodes samples, and cuts them at the length of a row."""
        whole = [encode_conversation(sample, tokenizer, template) for sample in samples]
        kept = [{name: ids[:length] for name, ids in sample.items()} for sample in whole]
        # The label of the very first token is never used.
        good = [sample for sample in kept if any(label != IGNORED for label in sample["labels"][1:])]
        return _Encoded(good, sum(len(s["input_ids"]) > length for s in whole), len(kept) - len(good))

    def rows(self, recipe: Tuning) -> list[Row]:
        """Several samples a row, or one, in an order of chance."""
        if recipe.packing:
            rows = pack_best_fit(self.samples, recipe.length)
        else:
            rows = [row for sample in self.samples for row in pack_best_fit([sample], recipe.length)]
        Random(recipe.seed).shuffle(rows)
        return rows


def show_batch(batch: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, colour: bool, most: int = 3) -> list[str]:
    """The conversations of a batch as the model gets them: what is learned is coloured, or between « ».

    Args:
        batch: `input_ids`, `labels` and `document_ids`, (B, T) each.
        tokenizer: of the model.
        colour: whether the terminal shows colours.
        most: conversations.
    """
    shown = []
    for ids, labels, documents in zip(*(batch[name].tolist() for name in Row._fields), strict=True):
        edges = [0, *(np.flatnonzero(np.diff(documents)) + 1).tolist(), len(ids)]
        for first, last in pairwise(edges):
            if documents[first] and len(shown) < most:
                piece = {"input_ids": ids[first:last], "labels": labels[first:last]}
                shown.append(show_in_terminal(piece, tokenizer, colour))
    return shown
