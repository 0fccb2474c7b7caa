"""The words of the generated tasks, in both languages, and how a sentence is made of them.

The word lists and sentence patterns are in ``tasks_words.json``. Whoever is told about is a number there, the same in
both languages: so a story is written down once, without a language, and then told in one.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

WORDS: dict[str, Any] = json.loads(Path(__file__).with_name("tasks_words.json").read_text(encoding="utf-8"))
COLUMN = {"en": 0, "zh": 1}  # of the lists that have one word a language
BETWEEN = {"en": " ", "zh": ""}  # what stands between two sentences
PRONOUNS = {"en": (("he", "his"), ("she", "her")), "zh": (("他", "他的"), ("她", "她的"))}


class Told(NamedTuple):
    """A story in a language: what is asked, the answer, and the way to it ("" where there is nothing to explain)."""

    question: str
    answer: str
    reasoning: str = ""


class Person(NamedTuple):
    """Someone of the lists "men" and "women"."""

    female: bool
    number: int

    def name(self, language: str) -> str:
        """What they are called in a language."""
        return WORDS["women" if self.female else "men"][self.number][COLUMN[language]]


def sentence(dice: Random, language: str, kind: str, **words: object) -> str:
    """One of the ways to say something.

    Args:
        dice: chooses the way.
        language: "en" or "zh".
        kind: a key of the sentences in ``tasks_words.json``.
        words: what its blanks are filled with.
    """
    return _capital(dice.choice(WORDS["sentences"][language][kind]).format_map(words))


def plain(language: str, kind: str, **words: object) -> str:
    """The plainest way to say something, in which chains of thought are written: the first of the list."""
    return _capital(WORDS["sentences"][language][kind][0].format_map(words))


def text(language: str, sentences: list[str]) -> str:
    """Sentences one after another."""
    return BETWEEN[language].join(sentences)


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
