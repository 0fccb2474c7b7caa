"""Booking a table: a request as people say it, and the record that a program can read.

Small enough to be learned in a minute, and not to be had by chance: five fields, some of which are copied (who, where)
and some written in another way (half past seven in the evening is 7:30 pm, 礼拜五 is 周五).
"""

from __future__ import annotations

import json
from random import Random
from typing import Any, NamedTuple

from aquila2_tut.data.tasks_words import BETWEEN, COLUMN, WORDS, Person, Told, plain, sentence

PLACES: dict[str, list[list[str]]] = WORDS["places"]
HOURS = (11, *range(13, 22))  # twelve is not said like the others


class Booking(NamedTuple):
    """Who wants a table, where (the two halves of a name), on which day of the week, when, and for how many."""

    person: Person
    place: tuple[int, int]
    day: int
    hour: int
    half: bool
    people: int


def draw_booking(dice: Random) -> Booking:
    """Anyone, anywhere; from eleven in the morning to half past nine in the evening; two to nine people."""
    return Booking(
        Person(dice.random() < 0.5, dice.randrange(len(WORDS["men"]))),
        (dice.randrange(len(PLACES["first"])), dice.randrange(len(PLACES["second"]))),
        dice.randrange(len(WORDS["days"])),
        dice.choice(HOURS),
        dice.random() < 0.5,
        dice.randint(2, 9),
    )


def key_of_booking(world: Booking) -> object:
    """All five fields."""
    return tuple(world)


def tell_booking(world: Booking, language: str, dice: Random) -> Told:
    """The request, after a line that says what to do with it; the answer is one line of JSON."""
    days = WORDS["days"][world.day][COLUMN[language]]
    words = {"name": world.person.name(language), "place": _place(world, language)}
    people = WORDS["numbers"][world.people][COLUMN[language]]
    said = {**words, "day": dice.choice(days), "time": _time(world, language, "said"), "people": people}
    written = (*words.values(), days[0], _time(world, language, "written"), world.people)
    record = dict(zip(WORDS["fields"][language], written, strict=True))
    asked = plain(language, "ask-booking") + BETWEEN[language] + sentence(dice, language, "booking", **said)
    return Told(asked, json.dumps(record, ensure_ascii=False))


def _place(world: Booking, language: str) -> str:
    first, second = (PLACES[half][number] for half, number in zip(("first", "second"), world.place, strict=True))
    return BETWEEN[language].join((first[COLUMN[language]], second[COLUMN[language]]))


def _time(world: Booking, language: str, how: str) -> str:
    """The time of a clock with twelve hours, as it is "said" or "written"."""
    part = WORDS["parts of the day"][0 if world.hour < 12 else 1 if world.hour < 18 else 2]
    hour = world.hour % 12
    words = {"hour": hour, "part": part[how][COLUMN[language]]}
    if how == "said":
        words["hour"] = WORDS["numbers"][hour][COLUMN[language]]
    return WORDS["clock"][language][how][world.half].format_map(words)


def same_record(given: str, wanted: str) -> bool:
    """Whether two texts are the same JSON, however it is spaced and in whatever order its fields come."""
    return _parsed(given) == _parsed(wanted) is not None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
