"""A small model's context extended, by every scaling of its rotation, with training and without: `aquila2-tut extend`.

What a model cannot do on a short text it will not do on a long one. So each seed first teaches it, at the length that
it was pretrained on, to find numbers in a text. The positions of the model that comes out are stretched, by each
method; it is measured as it is, then tuned a little at the new length, and measured again.

Every stage leaves its result in the folder, whole or not at all: a run that is killed is simply given again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aquila2_tut.assets import shipped
from aquila2_tut.config import Aquila2Config
from aquila2_tut.data import Row
from aquila2_tut.longcontext.errors import LongContextError
from aquila2_tut.longcontext.lessons import SOURCES, finding_rows, lines, long_texts, reading_rows
from aquila2_tut.longcontext.passkey import Answer, Maker, ask, make_items
from aquila2_tut.longcontext.perplexity import Encoded, by_context, by_position, encode
from aquila2_tut.model import Aquila2ForCausalLM
from aquila2_tut.tokenizer import load_tokenizer
from aquila2_tut.train.finetuning import recompute_layers
from aquila2_tut.train.loss import causal_loss
from aquila2_tut.train.pretrain import keep_rows, open_rows, save_model
from aquila2_tut.train.recipe import Run, arguments, claim
from aquila2_tut.train.trainer import Aquila2Trainer

_COUNTS = ("factors", "seeds", "steps", "batch_size", "lesson_steps", "lesson_batch", "documents", "items")
_FREE = ("methods", "factors", "seeds", "gradient_checkpointing")  # the bits of a cell do not depend on them
_LEFT_OUT = (*_FREE, "seed")  # of the conditions that are told with the results
METHODS = ("none", "linear", "ntk", "dynamic", "yarn")
STAGES = ("taught", "tuned")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
RECIPE = Path(__file__).with_name("nano.yaml")
RESULTS = "extended.json"
SHOWN = Path(__file__).with_name(RESULTS)


@dataclass(frozen=True)
class Extension(Run):
    """How a model is extended; `length` is what it was trained on.

    `steps` are those at four times that length; at another one there are as many as give the same number of tokens.

    Args:
        base: one of the book's own models, or a folder.
        methods: of `METHODS`; "none" leaves the rotation as it is.
        factors: by how much the context grows.
        seeds: of the rows and their order.
        finding: share of the rows in which numbers are to be found; the others are documents to read on in.
        lesson_steps, lesson_batch, lesson_finding: of the first lesson, at the old length.
        gradient_checkpointing: whether what lies between layers is computed a second time rather than kept.
        documents: of each language to measure on;
        document_tokens: that each has at least, whatever the context.
        items: numbers to find, at each length and depth and in each language.
    """

    base: str = "Aquila2-Nano"
    methods: tuple[str, ...] = METHODS
    factors: tuple[int, ...] = (4,)
    seeds: tuple[int, ...] = (1,)
    finding: float = 0.25
    lesson_steps: int = 100
    lesson_batch: int = 8
    lesson_finding: float = 0.5
    gradient_checkpointing: bool = False
    documents: int = 5
    document_tokens: int = 4096
    items: int = 3

    def faults(self) -> Iterator[tuple[str, str]]:
        """What makes no sense here: the field, and what is wrong with it."""
        for method in self.methods:
            if method not in METHODS:
                yield "methods", f"{method!r} is none of {', '.join(METHODS)}"
        for field in _COUNTS:
            value = getattr(self, field)
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, int) or number < 1:
                    yield field, f"whole numbers from 1 on are needed, not {number!r}"
        for field in ("finding", "lesson_finding"):
            if not 0 <= getattr(self, field) < 1:
                yield field, f"a share from 0 to below 1 is needed, not {getattr(self, field)!r}"


class Cell(NamedTuple):
    """What is measured once. Of the base model ("raw") there is one a factor, with seed 0."""

    factor: int
    seed: int
    method: str
    stage: str


def extend(recipe: Extension, folder: Path, told: Callable[[int, int, dict[str, Any]], None] | None = None) -> Path:
    """Teaches, stretches, measures, tunes and measures; goes on where an earlier call was stopped.

    Args:
        recipe: its methods, factors and seeds may be others when a run goes on: what is there is kept.
        folder: gets the models, and the results.
        told: called with the number of each cell, how many there are, and what it is, see `read_results`.

    Returns:
        The file of the results, see `read_results`.

    Raises:
        TrainError: the folder belongs to another recipe.
        AssetError: texts have not been fetched.
        LongContextError: there is no such model, or too few long texts.
    """
    claim(folder, recipe, free=_FREE)
    study = Study(recipe, folder)
    wanted = list(cells(recipe))
    for number, cell in enumerate(wanted, 1):
        if study.row(cell) is None:
            study.keep(cell, study.measured(study.model(cell), cell))
        if told:
            told(number, len(wanted), study.row(cell))
    return study.file


def cells(recipe: Extension) -> Iterator[Cell]:
    """What is measured, in its order."""
    for factor in recipe.factors:
        yield Cell(factor, 0, "none", "raw")
        for seed in recipe.seeds:
            yield from (Cell(factor, seed, method, stage) for method in recipe.methods for stage in STAGES)


def scaled(config: Aquila2Config, method: str, factor: int) -> Aquila2Config:
    """The configuration of a method; that of "none" says only that more positions are wanted."""
    if method == "none":
        fields = config.to_dict() | {"max_position_embeddings": config.trained_length * factor}
        return Aquila2Config(**fields)
    return config.stretched(method, factor)


class Extender(Aquila2Trainer):
    """The Trainer, with a loss in which an answer of one token counts as much as a page."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The mean over the rows of each row's mean over its labelled tokens."""
        count = len(inputs["input_ids"])
        rows = ({name: table[at : at + 1] for name, table in inputs.items()} for at in range(count))
        return sum(causal_loss(model, row) for row in rows) / count


class Study:
    """The stages of a run, each done once.

    Args:
        recipe: how it goes.
        folder: where its results lie.

    Raises:
        LongContextError: there is no such model.
    """

    def __init__(self, recipe: Extension, folder: Path) -> None:
        base = shipped(recipe.base) or Path(recipe.base)
        if not (base / "config.json").is_file():
            raise LongContextError(f"base: {recipe.base} is neither one of the book's models nor a folder of one")
        self.recipe, self.folder, self.base, self.file = recipe, folder, base, folder / RESULTS
        self.tokenizer = load_tokenizer(base)
        self.config = Aquila2Config.from_pretrained(base)
        self._texts: dict[str, dict[str, list[str]]] = {}
        self.rows: list[dict[str, Any]] = read_results(self.file)["cells"] if self.file.is_file() else []

    def row(self, cell: Cell) -> dict[str, Any] | None:
        """What is known of a cell, or None."""
        return next((row for row in self.rows if tuple(row[field] for field in Cell._fields) == cell), None)

    # --- models ------------------------------------------------------------------------------------------------------

    def model(self, cell: Cell) -> Aquila2ForCausalLM:
        """What a cell is measured on, made if it is not there yet."""
        config, place = scaled(self.config, cell.method, cell.factor), self.base
        if cell.stage != "raw":
            place = self.taught(cell.seed)
        if cell.stage == "tuned":
            name = f"{cell.method}-{cell.factor}-seed-{cell.seed}"
            steps = round(self.recipe.steps * 4 / cell.factor)
            run = dataclasses.replace(self.recipe, length=self.recipe.length * cell.factor, steps=steps)
            place = self.learned(name, place, config, run, cell.seed)
        return Aquila2ForCausalLM.from_pretrained(place, config=config, dtype=torch.float32).eval()

    def taught(self, seed: int) -> Path:
        """The folder of the model that has had its lesson at the old length."""
        recipe = self.recipe
        changes = {"steps": recipe.lesson_steps, "batch_size": recipe.lesson_batch, "finding": recipe.lesson_finding}
        run = dataclasses.replace(recipe, **changes)
        return self.learned(f"taught-seed-{seed}", self.base, self.config, run, seed)

    def learned(self, name: str, base: Path, config: Aquila2Config, run: Extension, seed: int) -> Path:
        """The folder of a model that has been through the rows of a run."""
        target, work = self.folder / name, self.folder / f"{name}-run"
        if target.is_dir():
            return target
        model = Aquila2ForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
        if run.gradient_checkpointing:
            recompute_layers(model)
        rows = self.lesson(run, seed)
        options = {"seed": seed, "report_to": "none", "save_total_limit": 1}
        trainer = Extender(model, arguments(run, work, **options), rows)
        trainer.resume_or_train()
        save_model(model, self.base, target, log=trainer.state.log_history)
        shutil.rmtree(work)
        return target

    # --- texts -------------------------------------------------------------------------------------------------------

    def lesson(self, run: Extension, seed: int) -> list[Row]:
        """Rows to read and rows to find numbers in; the same for every method."""
        place = self.folder / f"rows-{run.length}-seed-{seed}"
        if not place.is_dir():
            dice, rows = Random(f"lesson {run.length} {seed}"), run.steps * run.batch_size
            finding = round(rows * run.finding)
            texts = [text for found in self.texts("train").values() for text in found]
            to_read = reading_rows(self.tokenizer, texts, run.length, rows - finding, dice)
            keep_rows(to_read + finding_rows(self.makers("train"), run.length, finding, dice), place)
        return open_rows(place)

    def texts(self, split: str) -> dict[str, list[str]]:
        """The long documents of a split, by language."""
        if split not in self._texts:
            self._texts[split] = {language: list(long_texts(split, language)) for language in SOURCES}
        return self._texts[split]

    def makers(self, split: str) -> list[Maker]:
        """What hides numbers among the lines of one split, one a language."""
        return [
            Maker(self.tokenizer, language, lines(self.tokenizer, texts))
            for language, texts in self.texts(split).items()
        ]

    @cached_property
    def held_out_makers(self) -> list[Maker]:
        """Those that a model is asked by."""
        return self.makers("held-out")

    @cached_property
    def documents(self) -> list[Encoded]:
        """Long held-out documents, as many of each language, from all over its sources."""
        found: list[Encoded] = []
        for texts in self.texts("held-out").values():
            every = encode(self.tokenizer, texts)
            enough = [document for document in every if len(document.ids) >= self.recipe.document_tokens]
            count = min(self.recipe.documents, len(enough))
            found += [enough[len(enough) * index // count] for index in range(count)]
        return found

    # --- measuring ---------------------------------------------------------------------------------------------------

    def measured(self, model: Aquila2ForCausalLM, cell: Cell) -> dict[str, Any]:
        """Bits per byte by position, and how many numbers are found at each length and depth."""
        length = self.recipe.length * cell.factor
        lengths = [self.recipe.length * 2**power for power in range(cell.factor.bit_length())]
        found = {"bits": [list(band) for band in by_position(model, self.documents, length, lengths[:-1])]}
        if cell.stage == "raw":
            found["short"] = list(by_context(model, self.documents, self.recipe.length, last=length))
        items = [
            item for maker in self.held_out_makers for item in make_items(maker, lengths, DEPTHS, self.recipe.items)
        ]
        return found | {"passkey": summed(ask(model, items))}

    def keep(self, cell: Cell, found: dict[str, Any]) -> None:
        """Adds a cell to the results, in one step."""
        self.rows.append(cell._asdict() | found)
        conditions = {name: value for name, value in dataclasses.asdict(self.recipe).items() if name not in _LEFT_OUT}
        fresh = self.file.with_suffix(".new")
        fresh.write_text(_as_lines({"conditions": conditions, "cells": self.rows}), encoding="utf-8")
        os.replace(fresh, self.file)


def summed(answers: Sequence[Answer]) -> list[list[Any]]:
    """Answers as they are kept: language, length, depth, how many; right word for word, and by the likeliest of ten."""
    counts: dict[tuple[str, int, float], list[int]] = {}
    for answer in answers:
        count = counts.setdefault(answer[:3], [0, 0, 0])
        for place, more in enumerate((1, answer.exact, answer.rank == 0)):
            count[place] += int(more)
    return [[*key, *count] for key, count in counts.items()]


def _as_lines(results: dict[str, Any]) -> str:
    """JSON with a line a cell."""
    rows = ",\n".join(f"  {json.dumps(_rounded(row))}" for row in results["cells"])
    return f'{{\n "conditions": {json.dumps(results["conditions"])},\n "cells": [\n{rows}\n ]\n}}\n'


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 2) if isinstance(value, float) else value


def read_results(file: Path = SHOWN) -> dict[str, Any]:
    """What a run has measured: by default the one that the book shows.

    Returns:
        conditions; and cells, each with the fields of `Cell`, `bits` (the fields of `Band`, a row each), `passkey` (see
        `summed`), and for the base model `short`, the bits of the same tokens in windows as long as it was trained on.

    Raises:
        LongContextError: no such file, or no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LongContextError(f"{file}: no results of an extension: {error}") from None


def bits_per_byte(row: dict[str, Any]) -> float:
    """Of all positions of a cell."""
    return sum(band[2] for band in row["bits"]) / sum(band[3] for band in row["bits"])


def found_cells(row: dict[str, Any], likeliest: bool = True) -> dict[tuple[int, float], float]:
    """The share of numbers that a cell found, in both languages together, for each length and depth: a heat map.

    Args:
        row: of a cell.
        likeliest: whether the likeliest of ten candidates counts, or what the model would say.
    """
    counts: dict[tuple[int, float], list[int]] = {}
    for _, length, depth, total, *right in row["passkey"]:
        count = counts.setdefault((length, depth), [0, 0])
        count[0] += total
        count[1] += right[likeliest]
    return {cell: right / total for cell, (total, right) in sorted(counts.items())}


def found_share(row: dict[str, Any], length: int, likeliest: bool = True) -> float:
    """The share of numbers that a cell found in texts of one length; each depth has as many.

    Args:
        row: of a cell.
        length: tokens.
        likeliest: see `found_cells`.

    Raises:
        LongContextError: no text was as long.
    """
    shares = [share for (tokens, _), share in found_cells(row, likeliest).items() if tokens == length]
    if not shares:
        raise LongContextError(f"no number was asked for in texts of {length} tokens")
    return sum(shares) / len(shares)
