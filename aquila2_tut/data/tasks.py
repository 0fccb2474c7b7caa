"""Tasks that generate themselves: deduction, induction, kinship, arithmetic, booking, translation, the next line.

A world is thrown with dice; its key (what it holds, in no language and no order) says whether it belongs to training
or test; and it is told in English or Chinese. So the two sides have no story in common, whatever the seed, the order or
the language.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import regex

from aquila2_tut.data import tasks_booking as booking
from aquila2_tut.data import tasks_facts as facts
from aquila2_tut.data import tasks_kinship as kinship
from aquila2_tut.data import tasks_pairs as pairs
from aquila2_tut.data.corpora import LANGUAGES, DataError
from aquila2_tut.data.tasks_words import BETWEEN, WORDS, Told, plain

SPLITS = ("train", "test", "all")
ONE_IN = 8  # of how many worlds one is for the test

ANSWER = {"en": r"(?i)\banswer is:?\s*(.+?)(?:\.\s|\.?$|\n)", "zh": r"答案[是为：:]+\s*(.+?)(?:。|$|\n)"}
SINGULAR = {many: one for one, many, *_ in WORDS["species"]}
SYNONYMS: dict[str, str] = WORDS["synonyms"]

Material = Iterable[Sequence[str]]


@dataclass(frozen=True)
class Instance:
    """One question with its answer; reasoning is "" where there is nothing to explain."""

    task: str
    language: str
    question: str
    answer: str
    reasoning: str
    id: str

    def prompt(self, cot: bool = False) -> str:
        """The question, with the request to think step by step where there is something to think about."""
        think = BETWEEN[self.language] + plain(self.language, "think") if cot and self.reasoning else ""
        return self.question + think

    def conversation(self, cot: bool = False) -> dict[str, Any]:
        """The instance in the format of the training files.

        Args:
            cot: ask for a chain of thought, and let the answer give one, which ends in "So the answer is X."
        """
        value = self.answer
        if cot and self.reasoning:
            value = self.reasoning + BETWEEN[self.language] + plain(self.language, "answer", answer=self.answer)
        turns = [{"from": "human", "value": self.prompt(cot)}, {"from": "gpt", "value": value}]
        return {"id": self.id, "conversations": turns}


@dataclass(frozen=True)
class Task:
    """How instances come about.

    Args:
        worlds: (dice, material) -> worlds; endless unless they are taken out of the material.
        key: a world -> what decides on which side of the split it is.
        tell: (world, language, dice) -> question, answer, reasoning.
        needs_material: whether worlds are taken out of something.
        same: (output, answer) -> whether an output says the answer, where there is nothing to explain.
    """

    worlds: Callable[[Random, Material | None], Iterator[Any]]
    key: Callable[[Any], object]
    tell: Callable[[Any, str, Random], Told]
    needs_material: bool = False
    same: Callable[[str, str], bool] = pairs.same


def _endless(draw: Callable[[Random], Any]) -> Callable[[Random, Material | None], Iterator[Any]]:
    def worlds(dice: Random, _: Material | None) -> Iterator[Any]:
        while True:
            yield draw(dice)

    return worlds


TASKS: dict[str, Task] = {
    "babi15": Task(_endless(facts.draw_fears), facts.key_of_fears, facts.tell_fears),
    "babi16": Task(_endless(facts.draw_colours), facts.key_of_colours, facts.tell_colours),
    "kinship": Task(_endless(kinship.draw_family), kinship.key_of_family, kinship.tell_family),
    "arithmetic": Task(_endless(facts.draw_sum), facts.key_of_sum, facts.tell_sum),
    "booking": Task(
        _endless(booking.draw_booking), booking.key_of_booking, booking.tell_booking, same=booking.same_record
    ),
    "translate-en-zh": Task(pairs.to_chinese, pairs.key_of_passage, pairs.tell_to_chinese, True),
    "translate-zh-en": Task(pairs.to_english, pairs.key_of_passage, pairs.tell_to_english, True),
    "next-line": Task(pairs.next_lines, pairs.key_of_passage, pairs.tell_next_line, True),
}


def generate(
    task: str, language: str, split: str, seed: int = 0, material: Material | None = None
) -> Iterator[Instance]:
    """Instances of a task, without end where they are made up.

    The worlds depend on the seed alone: the n-th English and the n-th Chinese instance tell the same one.

    Args:
        task: a key of `TASKS`.
        language: "en" or "zh", of the question.
        split: "train", "test" (one world in eight), or "all" for material that has been split before.
        seed: other dice. No seed of "train" ever gives a world of "test".
        material: for translations (English, Chinese) pairs, None for JupyterLab's; for next-line each poem's lines.

    Raises:
        DataError: an unknown name, material where none is used, or no poems.
        AssetError: JupyterLab's sentences have not been fetched yet.
    """
    for what, name, names in (("task", task, TASKS), ("language", language, LANGUAGES), ("split", split, SPLITS)):
        if name not in names:
            raise DataError(f"there is no {what} {name!r}; known: {', '.join(names)}")
    if material is not None and not TASKS[task].needs_material:
        raise DataError(f"the task {task} makes up its own stories; it takes no material")
    return _instances(task, language, split, seed, material)


def _instances(task: str, language: str, split: str, seed: int, material: Material | None) -> Iterator[Instance]:
    made = TASKS[task]
    dice = Random(f"{task} {split} {seed}")
    # Dice of their own, or the words of one language would move its worlds away from the other's.
    words = Random(f"{task} {split} {seed} {language}")
    for world in made.worlds(dice, material):
        if split in ("all", side(made.key(world))):
            told = made.tell(world, language, words)
            yield Instance(task, language, *told, id=f"{task}-{language}-{_digest(told.question).hex()}")


def side(key: object) -> str:
    """The side of the split, "train" or "test", on which a world is.

    Args:
        key: what the world holds, of numbers, texts, tuples and lists.
    """
    return "train" if _digest(repr(key))[0] % ONE_IN else "test"


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


# --- judging an answer ---


def extract_answer(text: str, language: str) -> str:
    """The answer in what a model said: what follows its last "the answer is" / "答案是", or else all of it.

    Args:
        text: the model's output.
        language: "en" or "zh".
    """
    found = regex.findall(ANSWER[language], text.strip())
    return found[-1].strip() if found else text.strip()


def is_correct(instance: Instance, output: str) -> bool:
    """Whether a model's output gives the answer.

    A record must be the same JSON, a translation or a line of a poem the same words. A number counts if it is the last
    one said. Elsewhere the answer must stand alone, but for case, punctuation,
    an article, a plural, or a synonym such as 祖父 for 爷爷.
    """
    if not instance.reasoning:
        return TASKS[instance.task].same(output.strip(), instance.answer)
    given = extract_answer(output, instance.language)
    if instance.answer.isdigit():
        return regex.findall(r"(?<!\d)-?\d+", given.replace(",", ""))[-1:] == [instance.answer]
    return _essence(given) == _essence(instance.answer)


def _essence(answer: str) -> str:
    words = regex.findall(r"[\p{L}\p{N}]+(?:-[\p{L}\p{N}]+)*", answer.casefold())
    words = [SINGULAR.get(word, word) for word in words if word not in ("a", "an", "the")]
    joined = " ".join(words).removesuffix("的")
    return SYNONYMS.get(joined, joined)
