"""What the tests of figures share: draw one as a page would, and read its text."""

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
