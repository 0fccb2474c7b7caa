"""Figures of the fine-tuning chapter, and the file that the first of them draws."""

import statistics

import pytest
from figures import described, draw, well_made

from aquila2_tut.show import plot_methods
from aquila2_tut.train import TrainError
from aquila2_tut.train.published import measured_methods

ROW = {
    "right": {"value": 0.5, "low": 0.2, "high": 0.8},
    "seconds": 2.25,
    "peak": 1.5e9,
    "runs": [{"right": [0.0, share]} for share in (0.4, 0.5, 0.6)],
}
FIGURES = {"methods": lambda: plot_methods({"full": ROW, "qlora": ROW})}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_well_made(name, language, shown, monkeypatch):
    well_made(FIGURES[name], language, shown, monkeypatch)


def test_methods_are_told_in_words(shown, monkeypatch):
    said = described(draw(FIGURES["methods"], "en", shown, monkeypatch))
    assert said.endswith("Q-LoRA: 50% of the answers right, 2.2 s a step, 1.50 GB")


def test_what_was_measured_is_of_three_seeds_and_adds_up():
    """The intervals are computed once more, with the quantile of Student's t for two degrees of freedom."""
    found = measured_methods("smollm2")
    assert set(found["methods"]) == {"full", "lora", "qlora"}
    for row in found["methods"].values():
        assert [run["seed"] for run in row["runs"]] == found["conditions"]["seeds"] == [1, 2, 3]
        for what in ("loss", "right"):
            values = [run[what][1] for run in row["runs"]]
            half = 4.302653 * statistics.stdev(values) / 3**0.5
            assert row[what]["value"] == pytest.approx(statistics.mean(values), abs=1e-4)
            assert row[what]["high"] - row[what]["low"] == pytest.approx(2 * half, abs=3e-4)
    assert found["methods"]["lora"]["trainable"] == found["methods"]["qlora"]["trainable"] == 2_442_240


def test_a_model_that_was_not_measured():
    with pytest.raises(TrainError, match="not measured on 'gpt'; known: smollm2"):
        measured_methods("gpt")
