"""Three small worlds that are told in a few sentences: who is afraid of whom, who has which colour, who has how many.

Each has a function that throws the dice for a world, one that says what the world holds whatever the language and the
order (its key, by which training and test are told apart), and one that tells it.

Source: deduction and induction are tasks 15 and 16 of Weston et al. 2015, arXiv 1502.05698, after their description
there; the words and sentences are our own.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from aquila2_tut.data.tasks_words import COLUMN, PRONOUNS, WORDS, Person, Told, plain, sentence, text

SPECIES, PETS, COLOURS, THINGS = (WORDS[name] for name in ("species", "pets", "colours", "things"))


def _animal(number: int, language: str) -> tuple[str, str, str]:
    """A species as the predicate of one animal, as all of its kind, and as an answer."""
    one, many, chinese, unit = SPECIES[number]
    if language == "zh":
        return f"一{unit}{chinese}", chinese, chinese
    return f"{'an' if one[0] in 'aeiou' else 'a'} {one}", many, many


def _member(pet: int, species: int, language: str) -> dict[str, str]:
    return {"name": PETS[pet][COLUMN[language]], "a": _animal(species, language)[0]}


# --- deduction: mice are afraid of wolves, Bella is a mouse ---


class Fears(NamedTuple):
    """Rules (a species, the one it is afraid of) and members (a pet, its species); the first member is asked about."""

    rules: list[tuple[int, int]]
    members: list[tuple[int, int]]


def draw_fears(dice: Random) -> Fears:
    """Three or four rules, no two of or about the same species, and two to four animals to whom they apply."""
    species = dice.sample(range(len(SPECIES)), 6)
    afraid = species[: dice.randint(3, 4)]
    feared = dice.sample(species, len(afraid))
    while any(one == other for one, other in zip(afraid, feared, strict=True)):
        feared = dice.sample(species, len(afraid))
    pets = dice.sample(range(len(PETS)), dice.randint(2, 4))
    return Fears(list(zip(afraid, feared, strict=True)), [(pet, dice.choice(afraid)) for pet in pets])


def key_of_fears(world: Fears) -> object:
    """All its facts; which animal is asked about makes no other world."""
    return sorted(world.rules), sorted(world.members)


def tell_fears(world: Fears, language: str, dice: Random) -> Told:
    """The facts in any order, then the question."""
    rules = [{"afraid": _animal(one, language)[1], "of": _animal(other, language)[1]} for one, other in world.rules]
    members = [_member(*member, language) for member in world.members]
    story = [sentence(dice, language, "fear", **rule) for rule in rules]
    story += [sentence(dice, language, "member", **member) for member in members]
    dice.shuffle(story)
    species = world.members[0][1]
    rule = next(rule for (one, _), rule in zip(world.rules, rules, strict=True) if one == species)
    return Told(
        text(language, [*story, sentence(dice, language, "ask-fear", **members[0])]),
        rule["of"],
        text(language, [plain(language, "member", **members[0]), plain(language, "fear", **rule)]),
    )


# --- induction: Bella is a swan, Bella is white, Gus is a swan ---


class Colours(NamedTuple):
    """Examples (a pet, its species, its colour), and a pet of whom only the species is known."""

    examples: list[tuple[int, int, int]]
    asked: tuple[int, int]


def draw_colours(dice: Random) -> Colours:
    """Three or four examples, one a species, so that nothing in the story speaks against the conclusion."""
    species = dice.sample(range(len(SPECIES)), dice.randint(3, 4))
    asked, *pets = dice.sample(range(len(PETS)), len(species) + 1)
    examples = [(pet, one, dice.randrange(len(COLOURS))) for pet, one in zip(pets, species, strict=True)]
    return Colours(examples, (asked, species[0]))


def key_of_colours(world: Colours) -> object:
    """All its facts."""
    return sorted(world.examples), world.asked


def tell_colours(world: Colours, language: str, dice: Random) -> Told:
    """The facts in any order, then the question."""
    examples = [
        {**_member(pet, species, language), "colour": COLOURS[colour][COLUMN[language]]}
        for pet, species, colour in world.examples
    ]
    asked = _member(*world.asked, language)
    story = [sentence(dice, language, kind, **one) for one in examples for kind in ("member", "colour")]
    story.append(sentence(dice, language, "member", **asked))
    dice.shuffle(story)
    alike = examples[[species for _, species, _ in world.examples].index(world.asked[1])]
    steps = [plain(language, "member", **asked), *(plain(language, kind, **alike) for kind in ("member", "colour"))]
    return Told(
        text(language, [*story, sentence(dice, language, "ask-colour", **asked)]),
        alike["colour"],
        text(language, steps),
    )


# --- arithmetic: 12 apples, 5 given away, 8 bought ---

CALCULATE = {"+": int.__add__, "-": int.__sub__, "×": int.__mul__}
KIND = {"+": "plus", "-": "minus"}


class Sum(NamedTuple):
    """``numbers[0] signs[0] numbers[1] signs[1] numbers[2]``, of a thing that someone has; a friend takes or gives."""

    signs: tuple[str, str]
    numbers: tuple[int, int, int]
    thing: int
    people: tuple[Person, Person]

    def steps(self) -> list[dict[str, object]]:
        """The two sums, one after the other."""
        a, b, c = self.numbers
        first = CALCULATE[self.signs[0]](a, b)
        second = CALCULATE[self.signs[1]](first, c)
        return [
            {"a": a, "sign": self.signs[0], "b": b, "c": first},
            {"a": first, "sign": self.signs[1], "b": c, "c": second},
        ]


def draw_sum(dice: Random) -> Sum:
    """Two steps with whole numbers, nowhere below zero; a quarter of them begins with boxes that hold equally many."""
    one, friend = (Person(number % 2 == 1, number // 2) for number in dice.sample(range(2 * len(WORDS["men"])), 2))
    while True:
        if dice.random() < 0.25:
            signs, numbers = ("×", dice.choice("+-")), (dice.randint(2, 9), dice.randint(2, 9), dice.randint(2, 25))
        else:
            signs = (dice.choice("+-"), dice.choice("+-"))
            numbers = (dice.randint(3, 60), dice.randint(2, 25), dice.randint(2, 25))
        world = Sum(signs, numbers, dice.randrange(len(THINGS)), (one, friend))
        if all(step["c"] >= 0 for step in world.steps()):
            return world


def key_of_sum(world: Sum) -> object:
    """The sum alone: whoever has the apples, a sum of the test is not one of the training."""
    return world.signs, world.numbers


def tell_sum(world: Sum, language: str, dice: Random) -> Told:
    """What happened, in the order in which it happened, then the question."""
    words, (a, b, c) = _words_of_sum(world, language), world.numbers
    boxes = world.signs[0] == "×"
    story = [sentence(dice, language, "start-boxes" if boxes else "start", a=a, b=b, **words)]
    if not boxes:
        story.append(sentence(dice, language, KIND[world.signs[0]], n=b, **words))
    story.append(sentence(dice, language, KIND[world.signs[1]] + ("" if boxes else "-then"), n=c, **words))
    steps = world.steps()
    return Told(
        text(language, [*story, sentence(dice, language, "ask-sum", **words)]),
        str(steps[-1]["c"]),
        text(language, [plain(language, "sum", **step) for step in steps]),
    )


def _words_of_sum(world: Sum, language: str) -> dict[str, str]:
    things, boxes, chinese, unit, box = THINGS[world.thing]
    one, friend = world.people
    return {
        "name": one.name(language),
        "friend": friend.name(language),
        "they": PRONOUNS[language][one.female][0],
        "things": things if language == "en" else chinese,
        "boxes": boxes,
        "unit": unit,
        "box": box,
    }
