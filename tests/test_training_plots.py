"""Figures of the training chapter: what they count and say, in both languages."""

import pytest
import torch
from figures import described, draw, well_made

from aquila2_tut.data import collate, pack_stream, padding_share
from aquila2_tut.show import training_plots as plots
from aquila2_tut.train.loop import Settings, learning_rate

SETTINGS = Settings(steps=20, warmup=5, learning_rate=1e-2)
BATCH = collate(list(pack_stream([[1] * 5, [2] * 9, [3] * 20, [4] * 3], 16)), 0)
ESTIMATE = {"value": 2.0, "low": 1.9, "high": 2.2}
FIGURES = {
    "documents": lambda: plots.plot_documents(BATCH["document_ids"]),
    "padding": lambda: plots.plot_padding({"en": padding_share([5, 9, 20], length=32, batch_size=2)}),
    "schedules": lambda: plots.plot_schedules({"cosine": [learning_rate(SETTINGS, step) for step in range(20)]}),
    "losses": lambda: plots.plot_losses({"Nano": {100: 9.0, 200: 7.5}}, level=9.01),
    "sweep": lambda: plots.plot_sweep({1e-4: 8.0, 1e-3: 6.0, 1e-1: float("nan")}, start=9.0),
    "power law": lambda: plots.plot_power_law({10: 8.0, 100: 4.0, 1000: 2.0}, 16, 0.30103, (10, 100)),
    "bits": lambda: plots.plot_bits({"austen": {"Nano": ESTIMATE}, "Chinese": {"Nano": ESTIMATE}}, ["Nano"]),
}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_well_made(name, language, shown, monkeypatch):
    well_made(FIGURES[name], language, shown, monkeypatch)


def test_pieces_of_a_row_are_its_documents_and_its_padding():
    assert plots.pieces(torch.tensor([1, 1, 2, 3, 3, 3, 0, 0])) == [(1, 2), (2, 1), (3, 3), (0, 2)]


def test_a_batch_says_how_long_its_documents_are(shown, monkeypatch):
    svg = draw(FIGURES["documents"], "en", shown, monkeypatch)
    # 5 + 9 leave room for 2 of the 20; 16 more fill a row; then 2 and 3, and padding
    assert described(svg).endswith("1: 5, 9, 2; 2: 16; 3: 2, 3, 11 of padding")


def test_a_run_that_failed_is_never_the_best(shown, monkeypatch):
    assert described(draw(FIGURES["sweep"], "en", shown, monkeypatch)).startswith("Best: 0.001.")


def test_the_line_of_a_power_law_is_drawn_where_it_belongs(shown, monkeypatch):
    said = described(draw(FIGURES["power law"], "en", shown, monkeypatch))
    assert "slope -0.301" in said
    assert "the last point is at 2.00, the line at 2.00" in said
