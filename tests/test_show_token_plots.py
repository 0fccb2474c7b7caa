"""Figures about vocabularies: live text, the same bytes each time, words in the page's language, no warning."""

import re

import pytest
from figures import draw, words

from aquila2_tut.show import token_plots
from aquila2_tut.tokenizer import BytePairEncoding
from aquila2_tut.tokenizer.compare import Compression, Parallel

ENCODING = BytePairEncoding.train(["葡萄 葡萄 the the there"] * 3, 280)


def parallel(name, size, english, chinese):
    return Parallel(
        Compression(name, size, "en", 1000, 1000, round(1000 / english)),
        Compression(name, size, "zh", 400, 1200, round(400 / chinese)),
    )


RESULTS = [parallel("byte-level BPE", size, 1 + size / 2000, size / 2000) for size in (1024, 2048, 4096)]
AQUILA = parallel("Aquila", 100_008, 4.5, 1.8)
BLOCKS = [{"chinese": 40, "english": 50, "parts": 10}, {"chinese": 60, "english": 40}]
FIGURES = {
    "tree": lambda: token_plots.plot_merge_tree("葡萄", ENCODING),
    "kinds": lambda: token_plots.plot_vocabulary_kinds(BLOCKS, 100),
    "knob": lambda: token_plots.plot_size_knob(RESULTS, AQUILA),
    "tokenizers": lambda: token_plots.plot_tokenizers([*RESULTS[:1], AQUILA]),
}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_well_made(name, language, shown, monkeypatch):
    svg = draw(FIGURES[name], language, shown, monkeypatch)
    assert svg == draw(FIGURES[name], language, shown, monkeypatch), "the same figure gives other bytes"
    assert words(svg), "text was turned into outlines"
    said = re.search(r"<dc:description>(.*?)</dc:description>", svg, re.DOTALL)[1]
    assert len(said) > 40
    assert any("\u4e00" <= c <= "\u9fff" for c in said) == (language == "zh" or name == "tree")


def test_a_tree_shows_bytes_and_ids(shown, monkeypatch):
    text = words(draw(FIGURES["tree"], "en", shown, monkeypatch))
    assert {"E8", "91", "A1", "84", "葡萄"} <= set(text)
    assert str(ENCODING.encode("葡萄")[0]) in text
    tree = token_plots.grow_tree("abc", {"abc": ("a", "bc"), "bc": ("b", "c")})
    assert (tree.x, tree.y) == (0.75, 2)
    assert [leaf.x for leaf in (tree.parts[0], *tree.parts[1].parts)] == [0, 1, 2]


def test_the_cheapest_tokenizer_comes_first(shown, monkeypatch):
    said = draw(FIGURES["tokenizers"], "en", shown, monkeypatch)
    assert words(said).index("Aquila") < words(said).index("byte-level BPE")


@pytest.mark.parametrize(
    ("draw_wrong", "message"),
    [
        (lambda: token_plots.plot_merge_tree("the grapes", ENCODING), "tokens: a tree shows how one token grew"),
        (lambda: token_plots.plot_vocabulary_kinds([{"chines": 1}], 1), "chines"),
    ],
)
def test_wrong_input_is_refused(draw_wrong, message):
    with pytest.raises(ValueError, match=message):
        draw_wrong()
