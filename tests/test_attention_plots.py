"""Figures of the attention chapter: what they count, and what the table of GPUs says."""

import pytest
import torch

from aquila2_tut.memory import GPUS
from aquila2_tut.model import Documents
from aquila2_tut.model.costs import AttentionShape, visited_blocks
from aquila2_tut.model.documents import key_blocks
from aquila2_tut.show import attention_plots, slope
from aquila2_tut.show.attention_plots import bytes_text, tile_kinds


@pytest.fixture
def shown(monkeypatch):
    """Description and figure of what was displayed."""
    bundles = []
    monkeypatch.setattr(attention_plots, "show", lambda figure, alt, title="": bundles.append((alt, figure)))
    return bundles


def test_tiles_are_told_apart():
    documents = Documents.of_tokens(torch.ones(1, 40, dtype=torch.int), queries=40)
    ranges = key_blocks(documents, causal=True, query_block=16, key_block=16)[0]
    kinds = tile_kinds(documents.visible_before[0, 0], ranges, 16)
    assert kinds.tolist() == [[1, 3, 3], [0, 1, 3], [0, 0, 1]]
    assert (kinds < 3).sum() == visited_blocks(AttentionShape(1, 1, 1, 40, 40, 8), causal=True, block=16)[0]


def test_a_tile_computed_in_vain_is_named():
    assert tile_kinds([[1, 0, 0, 1]], [[0, 4]], 1).tolist() == [[0, 2, 2, 0]]


def test_slope_is_the_exponent_of_a_power_law():
    assert slope({8: 1.0, 16: 8.0}) == pytest.approx(3)


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (2**25, "32 MiB"), (2**34, "16 GiB")])
def test_bytes_in_words(count, text):
    assert bytes_text(count) == text


def test_figures_describe_themselves(shown):
    attention_plots.plot_growth({"eager": {8: 1e6, 16: 4e6}}, {"eager": {8: 1e-3, 16: 4e-3}})
    attention_plots.plot_roofline([GPUS["T4"], GPUS["A100-80G"]], {"decode": 1.0})
    attention_plots.plot_tiles({"one": (torch.ones(2, 2).tril(), [[0, 1], [0, 2]])}, 1)
    words = [alt for alt, _ in shown]
    assert "977 KiB → 3.81 MiB" in words[0]
    assert "A100-80G: 2.04 TB/s, 312 TFLOP/s, 153 FLOP/B" in words[1]
    assert "all visible 3" in words[2]
