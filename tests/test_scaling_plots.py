"""The figures of several GPUs: well made in both languages, and with the parts where the table says."""

import re

import pytest
from figures import draw, well_made, words

from aquila2_tut.memory import SPLIT, STRATEGIES, held_bytes
from aquila2_tut.show import plot_held, plot_placement, strategy_name

TABLE = {"7B, ZeRO-2": held_bytes("zero2", 8, 7_000_000_000), "7B, FSDP2": held_bytes("fsdp2", 8, 7_000_000_000)}
FIGURES = {
    "placement": lambda: plot_placement(STRATEGIES),
    "held": lambda: plot_held(TABLE, {"80 GB": 80e9}),
}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_well_made(name, language, shown, monkeypatch):
    well_made(FIGURES[name], language, shown, monkeypatch)


def test_a_bar_says_its_sum(shown, monkeypatch):
    said = words(draw(FIGURES["held"], "en", shown, monkeypatch))
    assert "26.2" in said and "14.0" in said  # 7 x (2 + 14 / 8), 7 x 16 / 8


def test_what_is_split_is_said(shown, monkeypatch):
    svg = draw(lambda: plot_placement(("copies", "zero2")), "en", shown, monkeypatch)
    assert "everything on every GPU; ZeRO-2: split are gradients, optimizer" in re.sub(r"\s+", " ", svg)
    assert set(SPLIT) == set(STRATEGIES) and strategy_name("copies") == "copies"
