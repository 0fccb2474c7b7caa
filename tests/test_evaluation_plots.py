"""Figures of the evaluation chapters."""

import xml.etree.ElementTree as ElementTree

import pytest
from figures import described, draw, well_made, words

from aquila2_tut.evaluate.published import aligned, size, skills, tables
from aquila2_tut.show import plot_leak, plot_reasoning, plot_sizes, plot_skills

GUESS, CHAT, SFT, COT = (0.2, 0.16, 0.25), (0.3, 0.25, 0.35), (0.4, 0.35, 0.45), (0.6, 0.5, 0.7)
ROW = {"guess": GUESS, "chat": CHAT, "sft": SFT, "cot": COT}
SCORES = {way: dict.fromkeys(("babi15", "babi16", "kinship", "mean"), ROW) for way in ("generation", "likelihood")}
LEAK = {
    "clean": {"leaked": [0.02, 0.04], "fresh": [0.01, 0.03]},
    "leak": {"leaked": [0.9, 1.0], "fresh": [0.02, 0.02]},
}
MODELS = ("AquilaChat2-34B", "AquilaChat2-34B+SFT", "AquilaChat2-34B+SFT+CoT")
TABLE = aligned()
SIZES = {name: (size(name), column["Mean"]) for name, column in zip(TABLE.models, TABLE.columns, strict=True)}
FIGURES = {
    "reasoning": lambda: plot_reasoning(SCORES),
    "leak": lambda: plot_leak(LEAK),
    "skills": lambda: plot_skills({"推理" if chinese() else "deduction": {"A": CHAT, "B": COT}}),
    "sizes": lambda: plot_sizes(SIZES, "平均" if chinese() else "mean"),
}


def chinese():
    from aquila2_tut.show import page_language

    return page_language() == "zh"


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_well_made(name, language, shown, monkeypatch):
    well_made(FIGURES[name], language, shown, monkeypatch)


def test_reasoning_is_told_in_words(shown, monkeypatch):
    said = described(draw(FIGURES["reasoning"], "en", shown, monkeypatch))
    assert said.startswith(
        "written answers, mean: a guess 20% (16% to 25%), Nano-Chat 30% (25% to 35%), + SFT 40% (35% to 45%)"
    )
    assert said.endswith("+ SFT + CoT 60% (50% to 70%)")


def test_a_leak_is_told_in_words(shown, monkeypatch):
    said = described(draw(FIGURES["leak"], "en", shown, monkeypatch))
    assert said.startswith("the test that got out, trained without it: 3%; the test that got out, trained with it: 95%")


def test_published_skills_have_the_intervals_of_thirty_items(shown, monkeypatch):
    """A third of 30 items: Wilson's interval by the formula as it is usually written."""
    found = skills(tables()["reasoning"], MODELS)
    assert list(found) == ["bAbI 16", "CLUTRR", "bAbI 15", "EntailmentBank", "αNLI", "e-CARE"]
    assert all(list(row) == list(MODELS) for row in found.values())
    p, n, z = 22 / 30, 30, 1.96
    centre, half = (p + z * z / (2 * n)), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    value, low, high = found["bAbI 16"]["AquilaChat2-34B+SFT"]
    assert value == pytest.approx(p)
    assert (low, high) == pytest.approx(
        ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)), abs=1e-3
    )
    svg = draw(lambda: plot_skills(found), "en", shown, monkeypatch)
    assert "AquilaChat2-34B+SFT+CoT" in words(svg)


def test_sizes_stand_in_the_names(shown, monkeypatch):
    assert [size(name) for name in ("Aquila2-34B v1.2", "Llama-2-70B-Chat", "Qwen-14B", "GPT-4", "XGen-7B-8K")] == [
        34,
        70,
        14,
        None,
        7,
    ]
    svg = draw(FIGURES["sizes"], "en", shown, monkeypatch)
    assert {"10", "50", "Aquila2-7B", "Llama-2-70B"} <= set(words(svg))
    assert "Aquila2-34B v1.2, 34 billion: 71.8" in described(svg)
    ElementTree.fromstring(svg)
