"""Figures of the chapter on long context."""

import pytest
from figures import described, draw, well_made, words

from aquila2_tut.show import Before, plot_passkey, plot_positions, plot_slowing, plot_stretched
from aquila2_tut.show.longcontext_plots import label

CELLS = {(512, 0.1): 1.0, (512, 0.9): 0.5, (2048, 0.1): 0.0, (2048, 0.9): 0.25}
CURVE = [(1, 512, 1.6), (512, 1024, 1.5), (1024, 2048, 3.25)]
ROWS = {"linear": Before([2.0, 4.0], [1.5]), "none": Before([5.0], [])}
SLOWED = {"linear": [8.0, 8.0, 8.0], "ntk": [1.0, 2.5, 8.0]}
FIGURES = {
    "slowing": lambda: plot_slowing(SLOWED, 2),
    "passkey": lambda: plot_passkey({"none": CELLS, "linear": CELLS}),
    "positions": lambda: plot_positions({"none": CURVE, "yarn": CURVE}, 512),
    "stretched": lambda: plot_stretched(ROWS, label("bits per byte", "每字节比特数"), 1.4),
}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_well_made(name, language, shown, monkeypatch):
    well_made(FIGURES[name], language, shown, monkeypatch)


def test_what_the_figures_say(shown, monkeypatch):
    said = {name: described(draw(figure, "en", shown, monkeypatch)) for name, figure in FIGURES.items()}
    assert said["slowing"].endswith("NTK-aware: 1.0 times slower at the first pair, 2.5 at pair 1, 8.0 at the last")
    assert said["passkey"].startswith("unscaled: 75% at 512 tokens, 12% at 2,048 tokens; linear (PI): ")
    assert said["positions"].endswith("YaRN: 1.60 up to position 512, 3.25 from 1,024 to 2,048")
    assert said["stretched"] == "bits per byte. linear (PI): 3.00, tuned 1.50; unscaled: 5.00, tuned –"


def test_every_cell_of_a_map_is_written_out(shown, monkeypatch):
    said = words(draw(lambda: plot_passkey({"yarn": CELLS}), "en", shown, monkeypatch))
    assert sorted(text for text in said if text in ("100", "50", "0", "25")) == ["0", "100", "25", "50"]


def test_maps_of_different_cells_are_refused():
    with pytest.raises(ValueError, match="same lengths and depths"):
        plot_passkey({"none": CELLS, "linear": {(512, 0.1): 1.0}})
    with pytest.raises(ValueError, match="at least one"):
        plot_passkey({})
