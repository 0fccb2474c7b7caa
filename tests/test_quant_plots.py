"""Figures of the quantization chapter: what they count and say, in both languages."""

import numpy as np
import pytest
import torch
from figures import described, draw, well_made

from aquila2_tut.quant import NF4_CODE, quantize_nf4
from aquila2_tut.show import quant_plots as plots

NAMES = ("fp32", "bf16", "int8-tensor", "nf4-dq", "gptq-4", "rtn-2")


def row(name, value):
    """A format of a model whose float32 has 2 bits per byte."""
    change = value - 2
    spread = {"value": change, "low": change - 0.01, "high": change + 0.02}
    kinds = {kind: {"value": value, "low": value - 0.1, "high": value + 0.1} for kind in plots.TEXTS}
    return {"name": name} | kinds | {f"{kind}_change": spread for kind in plots.TEXTS}


WEIGHT = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
MAXIMA = torch.tensor([[1.0] * 60 + [7.0] * 2 + [2.0] * 2, [2.0] * 63 + [300.0]])
ERRORS = [[0.01 * (layer + place) for place in range(7)] for layer in range(4)]
FIGURES = {
    "levels": lambda: plots.plot_weights_and_levels(WEIGHT),
    "bits": lambda: plots.plot_error_against_bits({"RTN": {4: 0.06, 2: 0.3}, "NF4": {4: 0.05}}),
    "layers": lambda: plots.plot_layer_errors({"RTN-4": ERRORS, "GPTQ-4": np.array(ERRORS) / 2}),
    "outliers": lambda: plots.plot_outliers(MAXIMA),
    "effect": lambda: plots.plot_effect([row(name, 2 + 0.01 * n) for n, name in enumerate(NAMES)]),
    "speed": lambda: plots.plot_speed_and_memory([{"name": "nf4", "weight_bytes": 81e6, "decode": 40.4}]),
}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_well_made(name, language, shown, monkeypatch):
    svg = well_made(FIGURES[name], language, shown, monkeypatch)
    assert len(svg) < 200_000, "too large for a page"


def test_shares_of_levels_are_those_of_the_codes():
    codes = quantize_nf4(WEIGHT, blocksize=64).codes
    two = torch.stack([codes >> 4, codes & 15], -1)
    shares = two.flatten().bincount(minlength=16) / WEIGHT.numel()
    found = plots.busiest(plots.in_blocks(WEIGHT, 64), NF4_CODE.tolist())
    assert found == pytest.approx((shares.min().item(), shares.max().item()), abs=1e-6)


def test_what_has_no_whole_block_is_not_counted():
    assert plots.in_blocks(torch.tensor([1.0, -2.0, 4.0, 1.0, 9.0]), 2).tolist() == [0.5, -1.0, 1.0, 0.25]


def test_the_even_levels_are_sixteen_from_minus_one_to_one():
    assert np.allclose(plots.EVEN, np.linspace(-1, 1, 16))


def test_what_a_format_adds_is_relative_to_float32():
    assert plots.added(row("nf4", 2.1), "english") == pytest.approx((5.0, 4.5, 6.0))


def test_the_effect_says_every_format(shown, monkeypatch):
    said = described(draw(FIGURES["effect"], "en", shown, monkeypatch))
    assert "int8 per tensor: English +1.0%, Chinese +1.0%, Python +1.0%" in said
    assert "float32" not in said and "RTN-2: English +2.5%" in said


def test_outliers_are_counted_and_the_largest_is_named(shown, monkeypatch):
    said = described(draw(FIGURES["outliers"], "en", shown, monkeypatch))
    assert "From 6 on: 1 to 2 of 64 channels" in said and "The largest of all is 300, in layer 1" in said


def test_the_worst_map_is_named(shown, monkeypatch):
    said = described(draw(FIGURES["layers"], "en", shown, monkeypatch))
    assert "RTN-4: median 4.5%, at most 9.0% (down of layer 3); GPTQ-4: median 2.2%, at most 4.5%" in said
