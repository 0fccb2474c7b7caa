"""Tasks out of texts that are there already: translate a sentence, say the next line of a poem.

What would give an answer away stays on one side of the split: sentences that share a translation, and the lines of one
poem.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from random import Random
from typing import NamedTuple

import regex

from aquila2_tut.data.corpora import DataError, parallel_sentences
from aquila2_tut.data.tasks_words import Told, sentence

MAX_ENGLISH, MAX_CHINESE = 160, 60  # characters; with its question, such a sentence stays below a hundred tokens or so


class Passage(NamedTuple):
    """What is given, what is to be said, and the name of all that must be on the same side of the split."""

    given: str
    wanted: str
    group: str


def bare(line: str) -> str:
    """A sentence without case, spaces and punctuation: what "Save as…" and "save As" have in common."""
    return regex.sub(r"[\p{P}\p{Z}\p{C}\p{S}]", "", line.casefold()) or line


def same(given: str, wanted: str) -> bool:
    """Whether two sentences are the same but for that."""
    return bare(given) == bare(wanted)


# --- translation ---


def to_chinese(dice: Random, pairs: Iterable[Sequence[str]] | None) -> Iterator[Passage]:
    """English sentences with their translations.

    Args:
        dice: orders them.
        pairs: (English, Chinese); None takes what JupyterLab says on its screen.

    Yields:
        Each English sentence once: of several translations the first counts.
    """
    yield from _shuffled(dice, [Passage(english, chinese, group) for group, english, chinese in _grouped(pairs)])


def to_english(dice: Random, pairs: Iterable[Sequence[str]] | None) -> Iterator[Passage]:
    """The same, the other way round, and on the same sides of the split."""
    yield from _shuffled(dice, [Passage(chinese, english, group) for group, english, chinese in _grouped(pairs)])


def _grouped(pairs: Iterable[Sequence[str]] | None) -> list[tuple[str, str, str]]:
    """The pairs that are short enough, each with the name of its group: all pairs that share a sentence are in one."""
    short = [pair for pair in map(_pair, parallel_sentences() if pairs is None else pairs) if _is_short(*pair)]
    parent: dict[str, str] = {}

    def find(word: str) -> str:
        while parent.setdefault(word, word) != word:
            parent[word] = word = parent[parent[word]]
        return word

    for english, chinese in short:
        one, other = sorted((find(f"en {bare(english)}"), find(f"zh {bare(chinese)}")))
        parent[other] = one  # the smaller name wins, so that the order of the pairs does not matter
    return [(find(f"en {bare(english)}"), english, chinese) for english, chinese in short]


def _pair(words: Sequence[str]) -> tuple[str, str]:
    if len(words) != 2:
        raise DataError(f"a pair for translation has an English and a Chinese sentence, this one {len(words)}: {words}")
    return words[0].strip(), words[1].strip()


def _is_short(english: str, chinese: str) -> bool:
    fits = 0 < len(english) <= MAX_ENGLISH and 0 < len(chinese) <= MAX_CHINESE
    return fits and "\n" not in english + chinese


def tell_to_chinese(world: Passage, language: str, dice: Random) -> Told:
    """The question in the reader's language, the sentence as it is."""
    return Told(sentence(dice, language, "to-zh", text=world.given), world.wanted)


def tell_to_english(world: Passage, language: str, dice: Random) -> Told:
    """The question in the reader's language, the sentence as it is."""
    return Told(sentence(dice, language, "to-en", text=world.given), world.wanted)


# --- poems ---


def next_lines(dice: Random, poems: Iterable[Sequence[str]] | None) -> Iterator[Passage]:
    """Every line of a poem that another one follows.

    Args:
        dice: orders them.
        poems: their lines, without title and author.

    Yields:
        A line once; one after which poems go on in different ways never, because nobody could know which is meant.

    Raises:
        DataError: no poems.
    """
    if poems is None:
        raise DataError("the task next-line needs poems, and there are none of its own: give a list of lists of lines")
    after: dict[str, dict[str, Passage]] = {}
    for poem in sorted([line.strip() for line in poem if bare(line.strip())] for poem in poems):
        for line, following in pairwise(poem):
            # The first poem of the alphabet has the line, so that the order of the poems does not matter.
            after.setdefault(bare(line), {}).setdefault(bare(following), Passage(line, following, bare("".join(poem))))
    only = [passage for ways in after.values() if len(ways) == 1 for passage in ways.values()]
    yield from _shuffled(dice, [one for one in only if len(one.given) + len(one.wanted) <= 2 * MAX_CHINESE])


def tell_next_line(world: Passage, language: str, dice: Random) -> Told:
    """The line, and which one follows it."""
    return Told(sentence(dice, language, "ask-next", text=world.given), world.wanted)


def key_of_passage(world: Passage) -> object:
    """The name of its group."""
    return world.group


def _shuffled(dice: Random, passages: list[Passage]) -> Iterator[Passage]:
    unique = {bare(passage.given): passage for passage in reversed(passages)}
    order = sorted(unique.values())
    dice.shuffle(order)
    return iter(order)
