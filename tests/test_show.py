"""Figures: live text, the same bytes each time, words in the page's language, no warning."""

import re
import types
import warnings

import numpy as np
import pytest
from figures import draw, words

from aquila2_tut.config import Aquila2Config
from aquila2_tut.model.rope import inverse_frequencies
from aquila2_tut.show import plots

TABLE = {
    "SmolLM2-135M": {"embedding": 28_311_552, "attention": 26_542_080, "feed_forward": 79_626_240, "norms": 35_136},
    "Aquila2-7B": {
        "embedding": 409_632_768,
        "attention": 2_147_483_648,
        "feed_forward": 4_328_521_728,
        "head": 409_632_768,
        "norms": 266_240,
    },
}
SEVEN = types.SimpleNamespace(
    head_dim=128, max_position_embeddings=2048, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
)
WEIGHTS = np.array([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.1, 0.2, 0.7]])
TOKENS = ["法国", "的", "首都"]
FIGURES = {
    "shares": lambda: plots.plot_parameter_shares(TABLE),
    "rope": lambda: plots.plot_rope(SEVEN),
    "attention": lambda: plots.plot_attention_pattern(WEIGHTS, TOKENS),
}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_well_made(name, language, shown, monkeypatch):
    svg = draw(FIGURES[name], language, shown, monkeypatch)
    assert svg == draw(FIGURES[name], language, shown, monkeypatch), "the same figure gives other bytes"
    assert shown[-1]["text/plain"] == "[figure]"
    assert words(svg), "text was turned into outlines"
    assert "DejaVu" not in svg
    assert "dc:date" not in svg
    said = re.search(r"<dc:description>(.*?)</dc:description>", svg, re.DOTALL)[1]
    assert len(said) > 40
    assert any("\u4e00" <= c <= "\u9fff" for c in said) == (language == "zh" or name == "attention")


def test_labels_are_in_the_language_of_the_page(shown, monkeypatch):
    assert "feed-forward" in words(draw(FIGURES["shares"], "en", shown, monkeypatch))
    assert "前馈网络" in words(draw(FIGURES["shares"], "zh", shown, monkeypatch))


def test_counts_are_written_as_people_write_them(monkeypatch):
    monkeypatch.setenv("AQUILA2_TUT_LANG", "en")
    assert [plots.count_text(n) for n in (134_515_008, 7_295_537_152)] == ["135 M", "7.30 B"]
    monkeypatch.setenv("AQUILA2_TUT_LANG", "zh")
    assert plots.count_text(7_295_537_152) == "72.96 亿"


def test_the_folder_of_the_notebook_chooses_the_language(tmp_path, monkeypatch):
    monkeypatch.delenv("AQUILA2_TUT_LANG", raising=False)
    for folder, language in (("en", "en"), ("zh", "zh"), ("elsewhere", "en")):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        assert plots.page_language() == language


def test_chinese_is_measured_at_its_width():
    figure, axes = plots.new_figure()
    axes.set_ylabel("显存占用")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide = plots.figure_to_svg(figure)
    axes.set_ylabel("WWWW")
    assert re.findall(r"translate\(([\d.]+)", wide) == re.findall(r"translate\(([\d.]+)", plots.figure_to_svg(figure))


def test_wavelengths_are_those_of_the_formula():
    waves = plots.rope_wavelengths(SEVEN)
    assert waves.shape == (64,)
    assert waves[0] == pytest.approx(2 * np.pi)
    assert waves[32] == pytest.approx(2 * np.pi * 100)
    stretched = types.SimpleNamespace(
        head_dim=128, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}
    )
    assert np.allclose(plots.rope_wavelengths(stretched), 8 * waves)


def test_wavelengths_agree_with_the_models_rotation():
    for name in ("Aquila2-7B", "AquilaChat2-7B-16K", "SmolLM2-135M"):
        config = Aquila2Config.preset(name)
        assert np.allclose(2 * np.pi / plots.rope_wavelengths(config), inverse_frequencies(config).numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("draw_wrong", "message"),
    [
        (lambda: plots.plot_parameter_shares({}), "no model"),
        (lambda: plots.plot_parameter_shares({"x": {"embeding": 1}}), "embeding"),
        (lambda: plots.plot_attention_pattern(WEIGHTS, ["a", "b"]), "2 tokens"),
    ],
)
def test_wrong_input_is_refused(draw_wrong, message):
    with pytest.raises(ValueError, match=message):
        draw_wrong()
