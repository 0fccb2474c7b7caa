"""Kinship: from two to four steps ("Adam's father is Ben. Ben's brother is Carl.") to what one is to another ("uncle").

Chinese tells relatives apart more finely than English: older and younger, the father's side and the mother's. So a
relation is its Chinese term here, of which the English one follows. A chain of steps is taken only where the term
follows from what is said: a father's son could be a brother or Adam himself, and which of two cousins is older nobody
says. Two names are two people, and siblings have both parents in common.

Source: the task is that of Sinha et al. 2019, arXiv 1908.06177, after its description there; words, sentences and rules
are our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from aquila2_tut.data.tasks_words import COLUMN, PRONOUNS, WORDS, Person, Told, plain, sentence, text

ENGLISH: dict[str, str] = WORDS["kin"]
OF: dict[str, dict[str, str]] = WORDS["of"]  # OF["爸爸"]["哥哥"] is what the father's older brother is
MALE_STEPS = {"爸爸", "哥哥", "弟弟", "儿子", "丈夫"}
FEMALE_STEPS = {"妈妈", "姐姐", "妹妹", "女儿", "妻子"}
HOPS = (2, 3, 4)


class Family(NamedTuple):
    """People in a row, and what each is to the one before; asked is what the last is to the first."""

    people: list[Person]
    steps: tuple[str, ...]


def known(steps: tuple[str, ...]) -> list[str]:
    """What everyone in a row of steps is to the first person.

    Args:
        steps: what the second is to the first, the third to the second, and so on.

    Raises:
        KeyError: a relation that does not follow.
    """
    found = [steps[0]]
    for step in steps[1:]:
        found.append(OF[found[-1]][step])
    return found


def _chains(hops: int) -> Iterator[tuple[str, ...]]:
    """All rows of steps of a length from which a relation follows."""
    if hops == 1:
        yield from ((step,) for step in sorted(MALE_STEPS | FEMALE_STEPS))
        return
    for chain in _chains(hops - 1):
        yield from ((*chain, step) for step in OF.get(known(chain)[-1], ()))


def _by_answer(hops: int) -> list[list[tuple[str, ...]]]:
    """The chains of a length, those with the same result together."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for chain in _chains(hops):
        groups.setdefault(known(chain)[-1], []).append(chain)
    return list(groups.values())


CHAINS = {hops: _by_answer(hops) for hops in HOPS}


def draw_family(dice: Random) -> Family:
    """A number of steps, then a relation, then a way to it: so that no relation is asked for more often than others."""
    steps = dice.choice(dice.choice(CHAINS[dice.choice(HOPS)]))
    first_is_female = steps[0] == "丈夫" or (steps[0] != "妻子" and dice.random() < 0.5)
    females = [first_is_female, *(step in FEMALE_STEPS for step in steps)]
    numbers = dice.sample(range(len(WORDS["men"])), len(females))
    return Family([Person(*one) for one in zip(females, numbers, strict=True)], steps)


def key_of_family(world: Family) -> object:
    """Who is what to whom, as English says it: what Chinese adds must not make two worlds of one English story."""
    return world.people, [ENGLISH[step] for step in world.steps]


def tell_family(world: Family, language: str, dice: Random) -> Told:
    """The steps in any order, then the question."""
    names = [person.name(language) for person in world.people]
    results = known(world.steps)
    story = [_step(world, number, language, dice) for number in range(len(world.steps))]
    dice.shuffle(story)
    reasons = [plain(language, "kin", one=names[0], kin=_term(world.steps[0], language), other=names[1])]
    for one, step, other, result in zip(names[1:], world.steps[1:], names[2:], results[1:], strict=False):
        terms = {"kin": _term(step, language), "known": _term(result, language)}
        reasons.append(plain(language, "so-kin", one=one, other=other, first=names[0], **terms))
    question = sentence(dice, language, "ask-kin", one=names[0], other=names[-1])
    return Told(text(language, [*story, question]), _term(results[-1], language), text(language, reasons))


def _step(world: Family, number: int, language: str, dice: Random) -> str:
    one, other = world.people[number : number + 2]
    return sentence(
        dice,
        language,
        "kin",
        one=one.name(language),
        other=other.name(language),
        kin=_term(world.steps[number], language),
        their=PRONOUNS[language][one.female][1],
        outing=dice.choice(WORDS["outings"])[COLUMN[language]],
    )


def _term(relation: str, language: str) -> str:
    return relation if language == "zh" else ENGLISH[relation]
