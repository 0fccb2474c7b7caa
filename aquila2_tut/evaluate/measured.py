"""What `benchmarks/reasoning.py` found: runs with several seeds, and what can be said of their differences.

Two things are up to chance: which questions are asked, and how a model was tuned (the seed of its data and their
order). An interval has both in it; whoever counts only the questions takes a lucky run for a better method.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import regex

from aquila2_tut.evaluate.errors import EvaluateError
from aquila2_tut.evaluate.intervals import Estimate
from aquila2_tut.evaluate.reasoning import THINKING, TUNED, VARIANTS, WAYS, Plan, guessed, test_set

Marks = Mapping[str, np.ndarray]  # task -> (seeds, questions), 1 where an answer is right


@dataclass(frozen=True)
class Reasoning:
    """The experiment with SFT and chains of thought.

    Args:
        conditions: model, threads, machine, versions, date, command.
        plan: see `aquila2_tut.evaluate.reasoning.Plan`.
        runs: variant, seed, tokens that were learned, losses of every tenth step, seconds; and the marks.
        seeds: of the tuned models.
    """

    conditions: Mapping[str, Any]
    plan: Mapping[str, Any]
    runs: Sequence[Mapping[str, Any]]
    seeds: tuple[int, ...]

    def marks(self, variant: str, way: str = "generation") -> Marks:
        """Which answers were right.

        Args:
            variant: one of `VARIANTS`. The chat model is one, whatever the seed, and has one row.
            way: "generation" or "likelihood".

        Raises:
            EvaluateError: no run is of that variant, or no such way.
        """
        chosen = [run for run in self.runs if run["variant"] == variant]
        if not chosen or way not in chosen[0]:
            raise EvaluateError(f"nothing was measured of {variant!r} by {way!r}")
        return {task: np.array([_bits(run[way][task]) for run in chosen]) for task in chosen[0][way]}

    def wrong_steps(self, variant: str) -> Marks:
        """Task -> where each chain of thought first went wrong, (seeds, questions); 0 where it did not.

        Of the runs for which that was stored, which are fewer than the others.

        Args:
            variant: "think" or "cot".

        Raises:
            EvaluateError: it was stored for none.
        """
        chosen = [run["wrong_step"] for run in self.runs if run["variant"] == variant and "wrong_step" in run]
        if not chosen:
            raise EvaluateError(f"no chain of thought of {variant!r} was looked at, only of {' and '.join(THINKING)}")
        return {task: np.array([_bits(steps[task]) for steps in chosen]) for task in chosen[0]}


@dataclass(frozen=True)
class Leak:
    """The experiment with a test in the training data.

    Args:
        plan: see `aquila2_tut.evaluate.leak.LeakPlan`.
        runs: variant ("clean" or "leak"), seed, marks of the "leaked" and the "fresh" test, and how many questions of
            each were found in the training data, by each look.
    """

    plan: Mapping[str, Any]
    runs: Sequence[Mapping[str, Any]]

    def marks(self, variant: str) -> Marks:
        """Test -> which answers were right, (seeds, questions)."""
        chosen = [run["right"] for run in self.runs if run["variant"] == variant]
        return {test: np.array([_bits(right[test]) for right in chosen]) for test in ("leaked", "fresh")}


def _bits(text: str) -> list[int]:
    return [int(mark) for mark in text]


def _stored() -> dict[str, Any]:
    return json.loads(resources.files(__package__).joinpath("reasoning.json").read_text(encoding="utf-8"))


def measured_reasoning() -> Reasoning:
    """SFT against SFT with chains of thought, as stored; only seeds of which both models are there."""
    stored = _stored()
    of = {variant: [r["seed"] for r in stored["reasoning"]["runs"] if r["variant"] == variant] for variant in TUNED}
    seeds = tuple(seed for seed in of["sft"] if seed in of["cot"])
    runs = [run for run in stored["reasoning"]["runs"] if run["variant"] not in TUNED or run["seed"] in seeds]
    return Reasoning(stored["conditions"], stored["reasoning"]["plan"], runs, seeds)


def measured_leak() -> Leak:
    """The leak, as stored."""
    return Leak(**_stored()["leak"])


# --- what can be said --------------------------------------------------------------------------------------------


def score(marks: Marks, seed: int = 0, rounds: int = 2000) -> Estimate:
    """The mean share of right answers, each task counting alike, with an interval over questions and seeds.

    Args:
        marks: task -> (seeds, questions); one task alone may be given.
        seed, rounds: of the draws.
    """
    return _crossed([marks], lambda shares: shares[0], seed, rounds)


def scores(found: Reasoning) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Way -> task, and "mean" at last -> "guess" and each variant -> share of right answers, see `score`."""
    guess = {task: np.array([right], dtype=int) for task, right in guessed(Plan(**found.plan)).items()}
    table: dict[str, dict[str, dict[str, Estimate]]] = {}
    for way in WAYS:
        marks = {"guess": guess, **{variant: found.marks(variant, way) for variant in VARIANTS}}
        table[way] = {
            task: {name: score({task: rows[task]}) for name, rows in marks.items()} for task in found.plan["questions"]
        }
        table[way]["mean"] = {name: score(rows) for name, rows in marks.items()}
    return table


def by_steps(found: Reasoning, task: str = "kinship", way: str = "generation") -> dict[int, dict[str, Estimate]]:
    """Steps of the reasoning -> variant -> share of right answers, see `score`: is what is longer harder?

    Args:
        found: what was measured.
        task: one of its tasks; those of kinship have from two to four steps.
        way: see `Reasoning.marks`.
    """
    asked = test_set(Plan(**found.plan))[task]
    steps = np.array([len(regex.findall("[.。]", instance.reasoning)) for instance in asked])
    marks = {variant: found.marks(variant, way)[task] for variant in VARIANTS}
    return {
        int(count): {variant: score({task: rows[:, steps == count]}) for variant, rows in marks.items()}
        for count in np.unique(steps)
    }


class Paired(NamedTuple):
    """A difference between two models on the same questions.

    Attributes:
        difference: of the second and the first, with its interval over questions and seeds.
        p: of the questions' signs: how often a difference as large comes about where neither is better.
        better: seeds of which the second is better.
        seeds: of how many.
    """

    difference: Estimate
    p: float
    better: int
    seeds: int


def paired(first: Marks, second: Marks, seed: int = 0, rounds: int = 2000) -> Paired:
    """Whether the second is better, by each question's own difference.

    What makes a question hard is so for both, and plays no part. The interval draws questions and seeds anew; the test
    throws a coin for each question, which says which of the two is which, and speaks of these very runs.

    Args:
        first, second: task -> (seeds, questions), of the same questions; a model that was not tuned has one row.
        seed, rounds: of the draws.

    Raises:
        EvaluateError: they are not of the same questions.

    Source: the test is Fisher's of 1935 (The Design of Experiments, section 21), by draws.
    """
    if {task: rows.shape[1] for task, rows in first.items()} != {t: rows.shape[1] for t, rows in second.items()}:
        raise EvaluateError("the two were not asked the same questions: compare them on the same ones")
    difference = _crossed([first, second], lambda shares: shares[1] - shares[0], seed, rounds)
    each = [second[task].mean(0) - rows.mean(0) for task, rows in first.items()]
    by_seed = np.mean([second[task].mean(1) - rows.mean(1) for task, rows in first.items()], axis=0)
    return Paired(difference, _sign_flips(each, seed, 10_000), int((by_seed > 0).sum()), len(by_seed))


def _crossed(models: Sequence[Marks], statistic: Any, seed: int, rounds: int) -> Estimate:
    """Draws seeds and questions anew, each for all models at once.

    Source: Owen 2007 (arXiv 0712.1111): rows and columns are drawn independently, which errs on the wide side.
    """
    dice = np.random.default_rng(seed)
    whole = [_shares(marks, None, None) for marks in models]
    tuned = max(len(rows) for marks in models for rows in marks.values())
    drawn = []
    for _ in range(rounds):
        seeds = dice.integers(tuned, size=tuned)
        items = {task: dice.integers(rows.shape[1], size=rows.shape[1]) for task, rows in models[0].items()}
        drawn.append(statistic([_shares(marks, seeds, items) for marks in models]))
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Estimate(float(statistic(whole)), float(low), float(high))


def _shares(marks: Marks, seeds: np.ndarray | None, items: Mapping[str, np.ndarray] | None) -> float:
    """The mean over tasks of the share that is right, of some seeds and questions or of all."""
    found = []
    for task, rows in marks.items():
        some = rows if seeds is None or len(rows) == 1 else rows[seeds]
        found.append((some if items is None else some[:, items[task]]).mean())
    return float(np.mean(found))


def _sign_flips(each: Sequence[np.ndarray], seed: int, rounds: int) -> float:
    """Two-sided p of a mean of means, if the sign of every entry were up to a coin."""
    dice = np.random.default_rng(seed)
    coins = [1 - 2 * dice.integers(2, size=(rounds, len(task)), dtype=np.int8) for task in each]
    thrown = np.mean([flips @ task / len(task) for flips, task in zip(coins, each, strict=True)], axis=0)
    found = abs(np.mean([task.mean() for task in each]))
    return float((1 + (abs(thrown) >= found - 1e-12).sum()) / (1 + rounds))
