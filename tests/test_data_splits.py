"""Splits and duplicates: against a comparison of every pair, on texts made here and on the fetched ones."""

import itertools
import random

import pytest
import regex

from aquila2_tut import assets
from aquila2_tut.data import SOURCES, DataError, Document, aligned_pairs, corpora, corpus, documents, splits

NEARLY = regex.compile(r"[\p{L}\p{N}]+")


def jaccard(one: str, other: str, language: str) -> float:
    """The share of three words in a row (or three characters) that two texts have in common, from its definition."""
    triples = []
    for text in (one, other):
        words = NEARLY.findall(text.lower())
        units = list("".join(words)) if language == "zh" else words
        triples.append({tuple(units[i : i + 3]) for i in range(max(1, len(units) - 2))})
    return len(triples[0] & triples[1]) / len(triples[0] | triples[1])


def made_up(count: int, language: str) -> list[Document]:
    """Random texts; every third is an earlier one with some of its words exchanged."""
    dice = random.Random(7)
    letters = [chr(code) for code in range(0x4E00, 0x4F00)] if language == "zh" else "abcdefghij"
    source = "songci" if language == "zh" else "austen"
    texts: list[list[str]] = []
    for number in range(count):
        if number % 3 == 2:
            text = list(dice.choice(texts))
            for _ in range(dice.randrange(0, 14)):
                text[dice.randrange(len(text))] = "".join(dice.choices(letters, k=2))
        else:
            text = ["".join(dice.choices(letters, k=2)) for _ in range(60)]
        texts.append(text)
    glue = "" if language == "zh" else " "
    return [Document(source, f"{number}", language, glue.join(text)) for number, text in enumerate(texts)]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_near_duplicates_against_a_comparison_of_every_pair(language):
    found = made_up(240, language)
    dropped = splits.find_duplicates(found)
    kept: list[Document] = []
    expected = set()
    for document in sorted(found, key=lambda document: splits.split_of(document.source, document.id), reverse=True):
        if any(jaccard(document.text, other.text, language) >= splits.NEAR for other in kept):
            expected.add(document.id)
        else:
            kept.append(document)
    assert len(expected) > 15
    # The index may overlook a pair just above the threshold, but calls none near that is not.
    assert set(dropped) <= expected
    assert len(set(dropped)) >= 0.97 * len(expected)


def test_the_same_words_are_an_exact_duplicate():
    found = [
        Document("austen", "a", "en", "It was late.\nNobody came."),
        Document("austen", "b", "en", "it was LATE -- nobody came"),
        Document("austen", "c", "en", "It was late. Somebody came."),
    ]
    assert set(splits.find_duplicates(found).values()) == {"exact"}
    assert len(splits.find_duplicates(found)) == 1


def test_the_document_for_training_stays():
    ids = [f"{number}" for number in range(400)]
    held_out = [id for id in ids if splits.split_of("austen", id) == "held-out"]
    train = [id for id in ids if id not in held_out]
    assert held_out
    assert train
    found = [Document("austen", id, "en", f"the same words {'again' * (id == held_out[1])}") for id in held_out + train]
    dropped = splits.find_duplicates(found)
    assert set(held_out) - set(dropped) == {held_out[1]}
    assert set(train) - set(dropped) == {train[0]}


def test_a_twentieth_is_held_out_and_translations_stay_together():
    shares = []
    for name in SOURCES:
        ids = [f"folder/page{number}" for number in range(5000)]
        shares.append(sum(splits.split_of(name, id) == "held-out" for id in ids) / len(ids))
    # Four standard deviations of a binomial distribution.
    assert all(abs(share - 0.05) < 4 * (0.05 * 0.95 / 5000) ** 0.5 for share in shares)
    for family in ("libreoffice", "jupyterlab"):
        assert all(splits.split_of(f"{family}-en", id) == splits.split_of(f"{family}-zh", id) for id in ids)
    assert any(splits.split_of("austen", id) != splits.split_of("songci", id) for id in ids)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """One source of forty documents, some of them twice, and an empty cache."""
    texts = {f"{number:02}": f"document {number % 30} " * 5 + "with words of its own" for number in range(40)}
    source = corpora.Source("en", "small", (), "CC0-1.0", "made here", {"en": "a", "zh": "b"}, lambda: texts.items())
    monkeypatch.setattr(corpora, "SOURCES", {"small": source})
    monkeypatch.setattr(splits, "SOURCES", {"small": source})
    monkeypatch.setenv("AQUILA2_TUT_HOME", str(tmp_path))
    return texts


def test_the_corpus_has_every_text_once(small):
    both = [document for split in splits.SPLITS for document in corpus(split)]
    assert sorted({document.text for document in both}) == sorted(set(small.values()))
    assert len(both) == 30
    assert {document.id for document in corpus("train")} == {
        document.id for document in both if splits.split_of("small", document.id) == "train"
    }
    assert list(corpus("train")) == list(corpus("train", ["small"]))


def test_duplicates_are_looked_for_once(small, tmp_path, monkeypatch):
    first = splits.duplicates("small")
    assert len(first) == 10
    (file,) = (tmp_path / "corpora").iterdir()
    monkeypatch.setattr(splits, "find_duplicates", lambda found: pytest.fail("looked again"))
    assert splits.duplicates("small") == first
    file.write_text("half a fi")
    with pytest.raises(pytest.fail.Exception, match="looked again"):
        splits.duplicates("small")


def test_a_cache_that_cannot_be_written_still_serves(small, tmp_path):
    (tmp_path / "corpora").write_text("a file where the folder should be")
    assert len(splits.duplicates("small")) == 10


def test_other_rules_are_another_decision(small, monkeypatch):
    before = splits._fingerprint("small")
    monkeypatch.setattr(splits, "NEAR", 0.9)
    assert splits._fingerprint("small") != before


def test_unknown_names():
    for wrong in (lambda: list(corpus("test")), lambda: aligned_pairs("test")):
        with pytest.raises(DataError, match="no split 'test'; known: train, held-out"):
            wrong()
    for wrong in (lambda: list(corpus("train", ["novels"])), lambda: list(documents("novels"))):
        with pytest.raises(DataError, match=r"no source 'novels'; known: libreoffice-en, .*dialogues-zh"):
            wrong()


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def help_of_two_pages(monkeypatch):
    """Two pages of each split; a sentence of the first stands on the second again."""
    ids = [f"p{number}" for number in range(400)]
    train = next(id for id in ids if splits.split_of("libreoffice-en", id) == "train")
    held_out = next(id for id in ids if splits.split_of("libreoffice-en", id) == "held-out")
    pages = {
        "en": {
            train: [("h", "Cut"), ("a", "Cuts it."), ("b", "Untranslated."), ("", "No id."), ("d", "A later home.")],
            held_out: [("c", "Copies it."), ("a", "Cuts it."), ("e", "A later home."), ("f", "Alone.")],
        },
        "zh": {
            train: [("h", "剪切"), ("a", "剪切它。"), ("b", "Untranslated."), ("", "无标识。"), ("d", "later")],
            held_out: [("c", "复制它。"), ("a", "剪切它。"), ("e", "后来才译。"), ("g", "独有。")],
        },
    }
    as_read = {
        language: {page: [splits.Paragraph(*pair) for pair in pairs] for page, pairs in content.items()}
        for language, content in pages.items()
    }
    monkeypatch.setattr(splits, "help_pages", as_read.get)
    monkeypatch.setattr(splits, "jupyterlab_pairs", lambda: iter([(train, [("Save", "保存"), ("Cut", "剪切")])]))


def test_pairs_belong_to_the_page_that_says_them_first(help_of_two_pages):
    assert aligned_pairs("held-out") == [("Copies it.", "复制它。")]
    # Of "Save" only the family of its source decides.
    assert aligned_pairs("train")[:2] == [("Cut", "剪切"), ("Cuts it.", "剪切它。")]
    assert ("A later home.", "后来才译。") not in aligned_pairs("train") + aligned_pairs("held-out")


# --- the fetched texts -----------------------------------------------------------------------------------------------


def fetched(*sources: str) -> None:
    for name in {name for source in sources for name in SOURCES[source].assets}:
        try:
            assets.path(name)
        except assets.AssetError as error:
            pytest.skip(f"asset not fetched: {error}")


def test_no_two_dialogues_are_near():
    fetched("dialogues-zh")
    everything = [document for split in splits.SPLITS for document in corpus(split, ["dialogues-zh"])]
    assert 300 < len(everything) < len(list(documents("dialogues-zh")))
    for one, other in itertools.combinations(everything, 2):
        assert jaccard(one.text, other.text, "zh") < splits.NEAR


def test_ids_are_unique_and_sources_share_nothing():
    """Duplicates are looked for source by source; this is what allows it."""
    fetched(*SOURCES)
    owner: dict[str, str] = {}
    for name in SOURCES:
        found = list(documents(name))
        assert len({document.id for document in found}) == len(found)
        assert all(document.text.strip() == document.text for document in found)
        for document in found:
            assert owner.setdefault(splits.normal(document.text), name) == name


def test_no_sentence_is_in_pairs_of_both_splits():
    fetched("libreoffice-en", "libreoffice-zh", "jupyterlab-zh")
    train, held_out = aligned_pairs("train"), aligned_pairs("held-out")
    assert len(train) > 20_000
    assert 0.03 < len(held_out) / len(train) < 0.08
    for side in (0, 1):
        assert not {pair[side] for pair in train} & {pair[side] for pair in held_out}
    assert all(regex.search(r"\p{Han}", chinese) for _, chinese in train + held_out)
