"""Predictions are told whether they are right, in the language of the page."""

from __future__ import annotations

import math
from numbers import Real

from ..memory.questions import Question, question
from .plots import label as words


def check(label: str, value: object) -> None:
    """Print whether a prediction is right; the answer is worked out now, and told only to those who have found it.

    Args:
        label: of a question, see `aquila2_tut.memory.questions`.
        value: the prediction, in the unit of the question.

    Raises:
        RehearsalError: there is no such question.
    """
    asked = question(label)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        print(
            words(
                f"{label}: {value!r} is not a number; {_wanted(asked)}", f"{label}：{value!r} 不是数；{_wanted(asked)}"
            )
        )
    else:
        print(label + words(": ", "：") + _verdict(asked, float(value)))


def _unit(asked: Question) -> str:
    return words(asked.unit, {"bytes": "字节", "ms": "毫秒"}.get(asked.unit, asked.unit))


def _wanted(asked: Question) -> str:
    return words(
        f"write it in {_unit(asked)}, without the unit and without quotes, such as 1.5",
        f"以 {_unit(asked)} 为单位，不写单位，不加引号，例如 1.5",
    )


def _verdict(asked: Question, value: float) -> str:
    answer = asked.answer()
    said = f"{value:g} {_unit(asked)}"
    if abs(value - answer) <= asked.within * abs(answer):
        return words(
            f"{said} is right, within {asked.within:.0%}; worked out, it is {answer:.4g}",
            f"{said}，对了，误差在 {asked.within:.0%} 以内；算出来是 {answer:.4g}",
        )
    if value < answer:
        return words(f"{said} is too little; try again", f"{said}，少了，再想想")
    return words(f"{said} is too much; try again", f"{said}，多了，再想想")
