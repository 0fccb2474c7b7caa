"""The data card: figures against counts made here, on texts made here and on those that CI has."""

import json
import re

import pytest

from aquila2_tut import assets, cli
from aquila2_tut.data import SOURCES, corpora, documents, splits, stats

TEXTS = {f"{number:03}": f"第{number % 90}篇。文字各不相同：{number % 90 * 7919}" for number in range(100)}


@pytest.fixture
def small(tmp_path, monkeypatch):
    source = corpora.Source(
        "zh", "small", ("a-text",), "CC0-1.0", "Thanks to nobody.", {"en": "numbered", "zh": "编号文本"}, TEXTS.items
    )
    for module in (corpora, splits, stats):
        monkeypatch.setattr(module, "SOURCES", {"small": source})
    monkeypatch.setenv("AQUILA2_TUT_HOME", str(tmp_path))
    monkeypatch.setattr(splits, "_fingerprint", lambda source: "0")


def test_statistics(small):
    row = stats.statistics("small")
    assert (row.documents, row.exact, row.near) == (90, 10, 0)
    assert row.train + row.held_out == 90
    assert row.held_out == sum(document.text != "" for document in splits.corpus("held-out"))
    left = set(TEXTS.values())
    assert row.characters == sum(map(len, left))
    assert row.bytes == sum(len(text.encode()) for text in left)


@pytest.mark.parametrize(
    ("language", "words"), [("en", ["near-duplicates", "numbered"]), ("zh", ["近似重复", "编号文本"])]
)
def test_the_card(small, capsys, language, words):
    assert cli.main(["data", "stats", "--lang", language]) == 0
    card = capsys.readouterr().out
    for word in [*words, "CC0-1.0", "Thanks to nobody.", "small: "]:
        assert word in card
    assert re.search(r"small +90 ", card)
    head, row = card.splitlines()[:2]
    assert stats._width(head) == stats._width(row.rstrip()) or len(head) >= len(row.rstrip())


def test_the_card_for_programs(small, capsys):
    assert cli.main(["data", "stats", "--json"]) == 0
    (card,) = json.loads(capsys.readouterr().out)
    assert card["documents"] == 90
    assert card["what"] == {"en": "numbered", "zh": "编号文本"}
    assert {"licence", "attribution", "language", "train", "held_out", "exact", "near"} <= set(card)


def test_fetch_asks_for_what_the_sources_need(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(assets, "fetch_all", lambda names: asked.append(list(names)) or ["/a/file"])
    assert cli.main(["data", "fetch", "songci", "yuanqu", "jupyterlab-en", "jupyterlab-zh"]) == 0
    assert asked == [["song-ci", "yuan-qu", "jupyterlab-zh"]]
    assert capsys.readouterr().out == "/a/file\n"
    assert cli.main(["data", "fetch"]) == 0
    assert set(asked[1]) == {name for source in SOURCES.values() for name in source.assets}
    assert set(asked[1]) <= set(assets.MANIFEST)


def test_errors_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AQUILA2_TUT_HOME", str(tmp_path))
    assert cli.main(["data", "stats", "songci"]) == 2
    assert re.fullmatch(r"aquila2-tut: song-ci .*aquila2-tut assets fetch song-ci\n", capsys.readouterr().err)
    assert cli.main(["data", "stats", "novels"]) == 2
    assert "there is no source 'novels'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["data", "eat"])


@pytest.mark.parametrize("language", ["en", "zh"])
def test_help_lists_the_actions(capsys, language):
    with pytest.raises(SystemExit) as left:
        cli.main(["data", "--help", "--lang", language])
    assert left.value.code == 0
    out = capsys.readouterr().out
    for action in cli.DATA_COMMANDS:
        assert f"{action:8}{cli.TEXTS[language][action]}" in out


def test_every_source_has_a_card_and_assets_with_its_licence():
    for name, source in SOURCES.items():
        assert source.language in ("en", "zh")
        assert set(source.what) == {"en", "zh"}
        assert source.licence
        assert source.attribution
        for asset in source.assets:
            # "MIT" of "MIT (package)", "BSD" of "BSD-3-Clause".
            assert assets.lookup(asset).licence[:3] == source.licence[:3], name


def test_python_docs_are_counted_anywhere():
    row = stats.statistics("python-docs")
    found = list(documents("python-docs"))
    assert row.documents + row.exact + row.near == len(found) > 300
