"""What the tests of figures share: draw one as a page would, and read its text."""

import re
import warnings
import xml.etree.ElementTree as ElementTree


def draw(plot, language, shown, monkeypatch):
    """The SVG that a plot function displays on a page of this language; any warning is an error."""
    monkeypatch.setenv("AQUILA2_TUT_LANG", language)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot()
    return shown[-1]["image/svg+xml"]


def words(svg):
    """The live text of a figure."""
    return ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def described(svg: str) -> str:
    """What a figure says of itself to those who do not see it."""
    return re.search(r"<dc:description>(.*?)</dc:description>", svg, re.DOTALL)[1]


def well_made(figure, language, shown, monkeypatch) -> str:
    """The SVG of a figure: the same bytes each time, live text, and the language of the page in it and beside it."""
    svg = draw(figure, language, shown, monkeypatch)
    assert svg == draw(figure, language, shown, monkeypatch), "the same figure gives other bytes"
    assert words(svg), "text was turned into outlines"
    assert any("\u4e00" <= c <= "\u9fff" for c in described(svg)) == (language == "zh")
    assert any("\u4e00" <= c <= "\u9fff" for text in words(svg) for c in text) == (language == "zh")
    return svg
