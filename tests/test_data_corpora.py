"""The small bilingual texts: how much there is, that pairs are pairs, and that no markup is left in them."""

import json
import zipfile

import pytest
import regex

from aquila2_tut import assets
from aquila2_tut.data import DataError, corpora, dialogues, parallel_sentences


@pytest.fixture
def fetched():
    for name in ("jupyterlab-zh", "chatterbot-corpus"):
        try:
            assets.path(name)
        except assets.AssetError as error:
            pytest.skip(f"asset not fetched: {error}")


def test_parallel_sentences(fetched):
    pairs = parallel_sentences()
    assert len(pairs) == len(set(pairs)) > 3000
    assert sum(len(chinese) for _, chinese in pairs) > 40_000
    for english, chinese in pairs:
        assert english
        assert regex.search(r"\p{Han}", chinese)
        assert not regex.search(r"[\x00-\x08]", english + chinese)
    assert ("Font size", "字体大小") in pairs


def test_parallel_sentences_against_the_compiled_catalogue(fetched):
    """The wheel holds each catalogue twice: as JSON, which is read, and compiled for gettext, which Python can read."""
    import gettext

    pairs = set(parallel_sentences())
    with zipfile.ZipFile(assets.path("jupyterlab-zh")) as box:
        name = next(name for name in box.namelist() if name.endswith("/jupyterlab.mo"))
        with box.open(name) as stream:
            catalogue = gettext.GNUTranslations(stream)._catalog
    expected = {
        (message.rpartition("\x04")[2].strip(), text.strip())
        for message, text in catalogue.items()
        if isinstance(message, str) and message.strip() and regex.search(r"\p{Han}", text)
    }
    assert len(expected) > 1500
    assert expected <= pairs


def test_dialogues(fetched):
    english, chinese = dialogues("en"), dialogues("zh")
    assert len(english) > 2000
    assert len(chinese) > 400
    assert english[0][0] == "What is AI?"
    assert all(isinstance(turn, str) for turns in english + chinese for turn in turns)
    assert sum(bool(regex.search(r"\p{Han}", "".join(turns))) for turns in chinese) > 0.95 * len(chinese)


def test_words_that_yaml_takes_for_something_else_stay_words(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "corpus.whl", "w") as box:
        box.writestr("data/english/a.yml", "conversations:\n- - yes\n  - 1984\n  - null\n")
        box.writestr("data/chinese/a.yml", "conversations:\n- - 是\n")
    monkeypatch.setattr(corpora.assets, "path", lambda name: tmp_path / "corpus.whl")
    assert dialogues("en") == [["yes", "1984", "null"]]


def test_a_message_is_cleaned(tmp_path, monkeypatch):
    catalogue = {
        "": {"domain": "x"},
        "menu\x04 Open ": ["打开"],
        "Open": ["打开"],
        "Dask": ["Dask"],
        "%1 file": ["%1 个文件", "x"],
    }
    with zipfile.ZipFile(tmp_path / "pack.whl", "w") as box:
        box.writestr("locale/a.json", json.dumps(catalogue))
    monkeypatch.setattr(corpora.assets, "path", lambda name: tmp_path / "pack.whl")
    assert parallel_sentences() == [("%1 file", "%1 个文件"), ("Open", "打开")]


def test_another_language():
    with pytest.raises(DataError, match="no dialogues in 'fr'; known: en, zh"):
        dialogues("fr")
