"""Figures of the chapter on memory."""

from types import SimpleNamespace

import pytest
from figures import described, draw, well_made, words

from aquila2_tut.memory.tracker import LABELS, Moment
from aquila2_tut.show import plot_peaks, plot_steps
from aquila2_tut.show.memory_plots import _PARTS, columns

STEP = [Moment("", "before", 10**9, "")]
STEP += [Moment("mm", "forward", (1 + i) * 10**9, "") for i in range(3)]
STEP += [Moment("mm", "recompute", 5 * 10**9, ""), Moment("mm", "backward", 4 * 10**9, "")]
STEP += [Moment("mul", "optimizer", 2 * 10**9, "")]
RUN = SimpleNamespace(timeline=STEP, allocated_bytes=5 * 10**9, peak_op=STEP[4])
PEAK = {"weights": 3 * 10**9, "logits": 10**9, "workspace": 10**9, "context": 4 * 10**8}
FIGURES = {
    "steps": lambda: plot_steps({"LoRA": RUN, "Q-LoRA": RUN}),
    "peaks": lambda: plot_peaks({"LoRA": PEAK, "Q-LoRA": PEAK | {"weights": 10**9}}),
}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_well_made(name, language, shown, monkeypatch):
    well_made(FIGURES[name], language, shown, monkeypatch)


def test_a_step_is_told_in_words(shown, monkeypatch):
    svg = draw(FIGURES["steps"], "en", shown, monkeypatch)
    assert described(svg).startswith("LoRA: begins with 1.0 GB, at most 5.0 GB, in the stage backward; Q-LoRA")
    assert words(svg).count("5.0 GB") == 2


def test_a_peak_is_told_in_words(shown, monkeypatch):
    said = described(draw(FIGURES["peaks"], "en", shown, monkeypatch))
    assert said.endswith("Q-LoRA: 3.4 GB (weights 1.0, activations 1.0, logits 1.0, context, buffers 0.4)")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_columns_keep_the_peak_wherever_it_is(count):
    for at in range(len(STEP)):
        moved = [*STEP[:at], STEP[4]._replace(bytes=9 * 10**9), *STEP[at + 1 :]]
        found = columns(moved, count)
        assert len(found) == min(count, len(STEP))
        assert max(moment.bytes for moment in found) == 9 * 10**9


def test_every_label_of_the_account_has_a_colour():
    drawn = [key for keys, *_ in _PARTS for key in keys]
    assert sorted(drawn) == sorted([*LABELS, "context"])
