"""What it does to a score when the test items are in the training data: the story of GSM8K, in small.

The README of Aquila2 withdrew its score on GSM8K, as a data set of mathematics with over two million samples turned out
to hold the 1,319 items of the test. Here Aquila2-Nano-Chat is tuned on two-step sums, once with a test among them and
once with as many other sums in its place; then it is asked that test, and a fresh one that the same generator threw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from aquila2_tut.data import Instance, generate
from aquila2_tut.evaluate.contamination import near_duplicates, overlaps
from aquila2_tut.evaluate.generated import held_out
from aquila2_tut.train.loop import Settings

_OWN_DICE = 2000  # stories that neither the chat model nor `aquila2_tut.evaluate.reasoning` was tuned on
LOOKS = ("an n-gram", "every n-gram", "near-duplicate")


@dataclass(frozen=True)
class LeakPlan:
    """How the leak goes.

    Args:
        task: of `aquila2_tut.data.TASKS`.
        language: of it.
        clean: training questions that are in no test.
        leaked: questions of the test, all of which get into the training data.
        fresh: questions of the other test.
        rounds: how often the training data are gone through.
        batch_size: questions a step.
        learning_rate: the highest.
    """

    task: str = "arithmetic"
    language: str = "en"
    clean: int = 200
    leaked: int = 80
    fresh: int = 160
    rounds: int = 6
    batch_size: int = 8
    learning_rate: float = 1e-3

    def settings(self, seed: int) -> Settings:
        """All rounds."""
        steps = (self.clean + self.leaked) * self.rounds // self.batch_size
        how = {"learning_rate": self.learning_rate, "precision": "bfloat16"}
        return Settings(steps=steps, batch_size=self.batch_size, seed=seed, save_every=50, **how)


def leaked_test(plan: LeakPlan, seed: int) -> list[Instance]:
    """The test that gets out."""
    return held_out(plan.task, plan.language, plan.leaked, _OWN_DICE + seed)


def fresh_test(plan: LeakPlan, seed: int) -> list[Instance]:
    """Questions of the same kind, no sum of which is in the test that gets out or in any training data."""
    out = {_essentials(one) for one in leaked_test(plan, seed)}
    stream = generate(plan.task, plan.language, "test", _OWN_DICE + seed + 500)
    return list(islice((one for one in stream if _essentials(one) not in out), plan.fresh))


def _essentials(instance: Instance) -> str:
    """What an instance is, whoever has the apples: its reasoning, which for sums is the two of them."""
    return instance.reasoning


def training_data(plan: LeakPlan, seed: int, *, leak: bool) -> list[Instance]:
    """What the model is tuned on: with the test in it, or with as many other questions in its place."""
    stream = generate(plan.task, plan.language, "train", _OWN_DICE + seed)
    clean, others = (list(islice(stream, count)) for count in (plan.clean, plan.leaked))
    found = clean + (leaked_test(plan, seed) if leak else others)
    Random(seed).shuffle(found)
    return found


def found_in(questions: Sequence[Instance], training: Sequence[Instance]) -> dict[str, int]:
    """Of how many questions each look of `aquila2_tut.evaluate.contamination` says that the training data hold them.

    Questions of one template share a sentence as a matter of course, so that an n-gram in common says little of them;
    that all the n-grams of a question are in one document says much, and so does a near-duplicate.

    Args:
        questions: of a test.
        training: the data to look through.

    Returns:
        One count for each of `LOOKS`.
    """
    asked, corpus = ([one.question for one in some] for some in (questions, training))
    shared = overlaps(asked, corpus)
    every = [finding for finding in shared if finding.share == 1]
    looks = (shared, every, near_duplicates(asked, corpus))
    return {name: len({finding.item for finding in found}) for name, found in zip(LOOKS, looks, strict=True)}
