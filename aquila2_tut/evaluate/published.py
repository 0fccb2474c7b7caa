"""Every figure that the README of Aquila2 prints, with source, date, shots and conditions; and what arithmetic says.

Three things come out. The image of the base models, as it was last published, has its columns one place too far to the
right: each model stands over the figures of its neighbour. The means beside it still are those of the right columns,
so they can be had back. And of seven gains that a news item claims, four are not what the figures say.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

from aquila2_tut.evaluate.errors import EvaluateError
from aquila2_tut.evaluate.intervals import Estimate, wilson

ENGLISH = (
    "WMT22 en-zh",
    "WinoGrande",
    "HellaSwag",
    "OpenBookQA",
    "PIQA",
    "ARC-e",
    "BoolQ",
    "TruthfulQA",
    "RAFT",
    "MMLU",
)
CHINESE = ("CLUEWSC", "BUSTM", "ChID", "EPRSTMT", "TNEWS", "OCNLI", "SEM", "C-Eval", "CMMLU", "CSL")
# What the means of the base models are of; GSM8K is not among them, its test items had been trained on.
MEANS = {"Mean": (*ENGLISH, *CHINESE, "HumanEval"), "Mean EN": ENGLISH, "Mean ZH": CHINESE}
_FIRST, _FINAL, _NEWEST = "base-image-first", "base-image-final", "Aquila2-34B v1.2"
_ROUNDED = 0.0100001  # figures with two digits, of which one may have been cut and the other rounded


@dataclass(frozen=True)
class Figure:
    """One published figure.

    Args:
        table: the table that it stands in, a key of `tables()`.
        date: when that was published, as exactly as it is known.
        source: where.
        model: the name over it.
        method: what was done with the model, such as how its context was extended; "" where that is not said.
        task: what was measured.
        shots: examples in the prompt; None where that is not said.
        value: None where the cell is empty.
        unit: of the value, "percent" as a rule.
        conditions: what else is known.
    """

    table: str
    date: str
    source: str
    model: str
    method: str
    task: str
    shots: int | str | None
    value: float | None
    unit: str
    conditions: str

    def interval(self) -> Estimate | None:
        """The share of right answers with its interval, where the number of items is known.

        It speaks of other items of the same kind, not of another prompt, which may change a figure by far more.
        """
        count = _data()["items"]["counts"].get(self.task)
        if self.value is None or self.unit != "percent" or count is None:
            return None
        return wilson(round(self.value / 100 * count), count)


@dataclass(frozen=True)
class Table:
    """A table as it is printed.

    Args:
        name, date, source, conditions: see `Figure`.
        models: the names over the columns.
        methods: one for each model; empty if there are none.
        shots: of each task.
        units: of the tasks whose figures are not percentages.
        columns: task -> value, one dictionary for each model.
    """

    name: str
    date: str
    source: str
    conditions: str
    models: tuple[str, ...]
    methods: tuple[str | None, ...]
    shots: Mapping[str, int | str | None]
    units: Mapping[str, str]
    columns: tuple[Mapping[str, float | None], ...]

    def column(self, model: str) -> Mapping[str, float | None]:
        """The figures under a name, by task.

        Raises:
            EvaluateError: no column has that name, or more than one has it.
        """
        found = [column for name, column in zip(self.models, self.columns, strict=True) if name == model]
        if len(found) != 1:
            raise EvaluateError(f"{self.name}: {len(found)} columns are named {model!r}, of {', '.join(self.models)}")
        return found[0]

    def figures(self) -> Iterator[Figure]:
        """The table as tidy data, a figure a cell."""
        common = {"table": self.name, "date": self.date, "source": self.source, "conditions": self.conditions}
        methods = self.methods or (None,) * len(self.models)
        for model, method, column in zip(self.models, methods, self.columns, strict=True):
            for task, value in column.items():
                what = {"task": task, "shots": self.shots[task], "unit": self.units.get(task, "percent")}
                yield Figure(model=model, method=method or "", value=value, **what, **common)


@functools.cache
def _data() -> dict[str, Any]:
    return json.loads(resources.files(__package__).joinpath("published.json").read_text(encoding="utf-8"))


def tables() -> dict[str, Table]:
    """The tables of the README, by name, in the order of their subject."""
    return {entry["name"]: _table(entry) for entry in _data()["tables"]}


def _table(entry: Mapping[str, Any]) -> Table:
    rows = {row["task"]: row["values"] for row in entry["rows"]}
    return Table(
        **{field: entry[field] for field in ("name", "date", "source", "conditions")},
        models=tuple(entry["models"]),
        methods=tuple(entry.get("methods", ())),
        shots={row["task"]: row["shots"] for row in entry["rows"]},
        units=entry.get("units", {}),
        columns=tuple(dict(zip(rows, cells, strict=True)) for cells in zip(*rows.values(), strict=True)),
    )


def figures() -> list[Figure]:
    """Every cell of every table; `pandas.DataFrame(figures())` makes a frame of it."""
    return [figure for table in tables().values() for figure in table.figures()]


def skills(table: Table, models: Sequence[str]) -> dict[str, dict[str, Estimate]]:
    """Task -> model -> share of right answers with its interval, for tasks whose number of items is known.

    Args:
        table: one of `tables()`.
        models: names over its columns, all of which have a figure for each such task.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for figure in table.figures():
        if figure.model in models and (estimate := figure.interval()):
            found.setdefault(figure.task, {})[figure.model] = estimate
    return found


class Favourable(NamedTuple):
    """The fewest items in which two models can differ, as published shares have it, and the sign test of those.

    Attributes:
        gains: items that only the second can have right.
        losses: items that only the first can have right.
        p: two-sided. Items that changed sides unseen, one for one within a task, could only make it larger.
    """

    gains: int
    losses: int
    p: float


def most_favourable(table: Table, first: str, second: str) -> Favourable:
    """How sure a difference can be at best, where the models' answers to single items were not published.

    Args:
        table: one of `tables()`, with tasks whose number of items is known.
        first, second: names over its columns.

    Source: the sign test as McNemar 1947 (doi 10.1007/BF02295996) has it, exact.
    """
    counts = _data()["items"]["counts"]
    changes = [
        round(found[second].value * counts[task]) - round(found[first].value * counts[task])
        for task, found in skills(table, (first, second)).items()
    ]
    gains, losses = sum(max(0, change) for change in changes), sum(max(0, -change) for change in changes)
    tail = sum(math.comb(gains + losses, few) for few in range(min(gains, losses) + 1)) / 2 ** (gains + losses)
    return Favourable(gains, losses, min(1.0, 2 * tail))


def size(model: str) -> float | None:
    """Billions of parameters, as far as the name says: 34 of "Aquila2-34B v1.2", None of "ChatGPT"."""
    said = re.search(r"(\d+(?:\.\d+)?)B\b", model)
    return float(said[1]) if said else None


def mean(column: Mapping[str, float | None], tasks: Sequence[str]) -> float:
    """The mean of those figures that there are.

    Raises:
        EvaluateError: there are none.
    """
    values = [value for task in tasks if (value := column.get(task)) is not None]
    if not values:
        raise EvaluateError(f"there is no figure for any of {', '.join(tasks)}")
    return sum(values) / len(values)


# --- the shifted image -----------------------------------------------------------------------------------------------


class Match(NamedTuple):
    """How many cells of two tables are equal when one is moved by so many columns, and which are not.

    Attributes:
        offset: columns by which the later table is moved to the right.
        equal: cells that are the same in both.
        compared: cells that both have.
        different: (task, name over the earlier table's column, earlier value, later value) of the others.
    """

    offset: int
    equal: int
    compared: int
    different: tuple[tuple[str, str, float | None, float | None], ...]


def shifts(earlier: Table, later: Table, furthest: int = 3) -> list[Match]:
    """For each offset, how well the later table repeats the earlier one that many columns further to the right.

    Args:
        earlier, later: with tasks in common, means left out.
        furthest: the largest offset to try, to either side.
    """
    tasks = [task for task in earlier.shots if task in later.shots and task not in MEANS]
    return [_match(earlier, later, tasks, offset) for offset in range(-furthest, furthest + 1)]


def _match(earlier: Table, later: Table, tasks: Sequence[str], offset: int) -> Match:
    cells = [
        (task, name, before[task], later.columns[index + offset][task])
        for index, (name, before) in enumerate(zip(earlier.models, earlier.columns, strict=True))
        if 0 <= index + offset < len(later.columns)
        for task in tasks
    ]
    different = tuple(cell for cell in cells if cell[2] != cell[3])
    return Match(offset, len(cells) - len(different), len(cells), different)


def owners_of_means(table: Table, mean_of: str = "Mean") -> dict[str, tuple[str, ...]]:
    """For each name, over which columns of the table the figures stand whose mean is printed under that name.

    Args:
        table: with a row of means.
        mean_of: a key of `MEANS`.
    """
    found = {name: mean(column, MEANS[mean_of]) for name, column in zip(table.models, table.columns, strict=True)}
    printed = {name: column[mean_of] for name, column in zip(table.models, table.columns, strict=True)}
    return {
        name: tuple(other for other, value in found.items() if abs(value - wanted) < _ROUNDED)
        for name, wanted in printed.items()
    }


def aligned() -> Table:
    """The base models with each figure under its own name, and with means computed from the figures.

    The first column of the final image is that of the newest model; what comes after it is in the earlier image, under
    the right names. GSM8K is there as the earlier image has it.
    """
    first, final = tables()[_FIRST], tables()[_FINAL]
    tasks = [task for task in first.shots if task not in MEANS]
    newest = {task: final.columns[0].get(task) for task in tasks}
    columns = [dict(column) for column in (newest, *first.columns)]
    for column in columns:
        column.update({name: round(mean(column, of), 2) for name, of in MEANS.items()})
    return Table(
        name="base-aligned",
        date=final.date,
        source=f"{final.source} (first column); {first.source} (the others); means: computed",
        conditions=first.conditions,
        models=(_NEWEST, *first.models),
        methods=(),
        shots={**first.shots, **dict.fromkeys(MEANS)},
        units={},
        columns=tuple(columns),
    )


# --- the news --------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """A gain that was claimed, in percent of what was there before, and the one that the figures give."""

    task: str
    before: float
    after: float
    claimed: float
    found: float

    @property
    def holds(self) -> bool:
        """Whether they are the same, rounded as the claim is."""
        digits = 0 if float(self.claimed).is_integer() else 1
        return round(self.found, digits) == self.claimed


def claims() -> list[Claim]:
    """What the news item of version 1.2 says that it gained over 1.0, beside what it did."""
    table = aligned()
    before, after = table.column("Aquila2-34B"), table.column(_NEWEST)
    return [
        Claim(task, old, new, row["percent"], 100 * (new / old - 1))
        for row in _data()["news"]["gains"]
        for task in [row["task"]]
        for old, new in [(before[task], after[task])]
    ]
