"""The glossary is complete in both languages, and the Chinese chapters keep to it."""

import json
import re
from pathlib import Path

import pytest

BOOK = Path(__file__).resolve().parents[2] / "book"

CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)


@pytest.fixture(scope="module")
def terms(hooks):
    return hooks.glossary.load_terms()


def prose_of(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return CODE.sub(" ", text)


def test_every_term_has_both_languages(terms):
    for term in terms:
        assert all(term.get(key, "").strip() for key in ("en", "zh", "note_en", "note_zh")), term
        assert set(term) <= {"en", "zh", "note_en", "note_zh", "avoid"}, term


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_term_stands_twice(terms, language):
    names = [term[language].lower() for term in terms]
    assert len(names) == len(set(names))


def test_terms_are_in_order(terms):
    names = [term["en"].lower() for term in terms]
    assert names == sorted(names)


def test_no_word_is_both_used_and_avoided(terms):
    used = {term["zh"] for term in terms}
    avoided = {word for term in terms for word in term.get("avoid", [])}
    assert not used & avoided
    assert not [(word, name) for word in avoided for name in used if word in name]


@pytest.mark.parametrize("path", sorted((BOOK / "zh").glob("*.*")), ids=lambda p: p.name)
def test_chinese_chapters_use_the_terms(terms, path):
    text = prose_of(path)
    found = [(word, term["zh"]) for term in terms for word in term.get("avoid", []) if word in text]
    assert not found, "\n".join(f"{path.name}: write {zh} in place of {word}" for word, zh in found)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_glossary_page_lists_every_term(terms, hooks, language):
    assert "{book-glossary}" in (BOOK / language / "glossary.md").read_text(encoding="utf-8")
    lines = hooks.glossary.glossary_lines(terms, language)
    assert all(term[language] in lines for term in terms)
    other = "zh" if language == "en" else "en"
    assert all(any(term[other] in line for line in lines) for term in terms)
