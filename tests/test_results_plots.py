"""Figures of published results."""

import pytest
from figures import described, draw, well_made, words

from aquila2_tut.evaluate.intervals import wilson
from aquila2_tut.show import plot_intervals, plot_languages

MEANS = {"Aquila2-7B": (63.7, 56.5), "Llama-2-7B": (57.9, 37.5)}
SHARES = {"AquilaChat2-34B": wilson(20, 30), "GPT-4": wilson(30, 30)}
FIGURES = {
    "languages": lambda: plot_languages(MEANS),
    "intervals": lambda: plot_intervals(SHARES),
}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_well_made(name, language, shown, monkeypatch):
    well_made(FIGURES[name], language, shown, monkeypatch)


def test_figures_are_told_in_words(shown, monkeypatch):
    said = {name: described(draw(figure, "en", shown, monkeypatch)) for name, figure in FIGURES.items()}
    assert said["languages"] == "Aquila2-7B: English 63.7, Chinese 56.5; Llama-2-7B: English 57.9, Chinese 37.5"
    assert said["intervals"].startswith("AquilaChat2-34B: 66.7%, between 48.8% and 80.8%; GPT-4: 100.0%")


def test_what_the_means_are_of_stands_below_them(shown, monkeypatch):
    assert "mean of ten tasks, %" in words(draw(FIGURES["languages"], "en", shown, monkeypatch))
    assert "of two" in words(draw(lambda: plot_languages(MEANS, "of two"), "en", shown, monkeypatch))
