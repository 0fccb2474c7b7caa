"""A planted leak is found, a clean corpus is not accused, and the shares are those that a plain count gives."""

import random
import re

import pytest

from aquila2_tut.data import generate
from aquila2_tut.evaluate import EvaluateError
from aquila2_tut.evaluate.contamination import ALIKE, WORDS, near_duplicates, overlaps, tokens
from aquila2_tut.evaluate.tasks import SETS, load_items

QUESTIONS = {name: [item["question"] for item in load_items(name)] for name in ("gsm8k-en", "gsm8k-zh")}


def clean(language, count=300):
    """Documents that nobody took out of our items: stories of the generated tasks, on other subjects."""
    stream = generate("arithmetic", language, "train", 3), generate("kinship", language, "train", 3)
    return [next(side).question for _ in range(count // 2) for side in stream]


def planted(text, rng):
    """A copy as it is found on a page: other case, other punctuation, text before and after."""
    return f"Homework of the week!\n\n{text.upper().replace('.', ' ;')}\n Solutions on page {rng.randrange(99)}"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_planted_leak_is_found_and_nothing_else(language):
    items, rng = QUESTIONS[f"gsm8k-{language}"], random.Random(0)
    corpus = clean(language)
    assert overlaps(items, corpus) == [] and near_duplicates(items, corpus) == []
    places = dict(zip((3, 77, 150), (2, 5, 11), strict=True))
    for place, item in places.items():
        corpus[place] = planted(items[item], rng)
    found = overlaps(items, corpus)
    assert {(f.document, f.item) for f in found} == set(places.items())
    assert all(f.share == 1 and f.kind == "n-gram" for f in found)
    for finding in found:
        assert finding.quoted.split() == tokens(items[finding.item])


@pytest.mark.parametrize("name", SETS)
def test_no_set_of_ours_is_accused_of_being_in_another(name):
    """A dozen items of one kind share their form; that alone is no leak."""

    def texts(of):
        asked = ("question", "Question", "premise", "obs1", "problem", "en")
        return [next(item[field] for field in asked if field in item) for item in load_items(of)]

    if name.startswith("winogrande"):
        pytest.skip("its pairs differ in one word, which is what the set is about")
    others = [text for other in SETS if other != name and not other.startswith("winogrande") for text in texts(other)]
    assert overlaps(texts(name), others) == []
    assert near_duplicates(texts(name), others) == []


def test_a_leak_with_changed_words_is_a_near_duplicate_and_not_an_n_gram():
    item = "Seven old sailors carried twelve heavy barrels from the harbour up to the castle before dark on a Monday"
    words = item.split()
    words[7] = "cove"
    changed = [" ".join(words).replace("cove", "the cove")]
    (finding,) = near_duplicates([item], changed)
    assert finding.kind == "near-duplicate" and finding.share >= ALIKE
    every_fifth = [" ".join(word if at % 5 else "other" for at, word in enumerate(item.split()))]
    assert near_duplicates([item], every_fifth) == [] and overlaps([item], every_fifth) == []


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_those_of_a_plain_count(seed):
    """Against a count with strings and `in`, on random texts of a small vocabulary, where much is shared."""
    rng = random.Random(seed)
    items = [" ".join(rng.choices("abcde", k=rng.randint(3, 14))) for _ in range(15)]
    corpus = [" ".join(rng.choices("abcde", k=40)) for _ in range(10)]
    n, wanted = 4, {}
    for i, item in enumerate(items):
        words = item.split()
        size = min(n, len(words))
        grams = [" ".join(words[at : at + size]) for at in range(len(words) - size + 1)]
        for d, document in enumerate(corpus):
            share = sum(f" {gram} " in f" {document} " for gram in grams) / len(grams)
            if share:
                wanted[i, d] = share
    found = {(f.item, f.document): f for f in overlaps(items, corpus, n)}
    assert {key: f.share for key, f in found.items()} == pytest.approx(wanted)
    for (item, document), finding in found.items():
        assert f" {finding.quoted} " in f" {items[item]} " and f" {finding.quoted[:7]} " in f" {corpus[document]} "


def test_near_duplicates_are_counted_exactly():
    rng = random.Random(1)
    items = [" ".join(map(str, rng.choices(range(1000), k=20))) for _ in range(20)]
    corpus = []
    for item in items:
        words = re.findall(r"\d+", item)
        words[rng.randrange(20)] = "other"
        corpus.append(" ".join(words))

    def shingles(text):
        words = re.findall(r"\w+", text)
        return {" ".join(words[at : at + 4]) for at in range(len(words) - 3)}

    found = near_duplicates(items, corpus)
    assert {f.item for f in found if f.item == f.document} == set(range(20))
    for finding in found:
        one, other = shingles(items[finding.item]), shingles(corpus[finding.document])
        assert finding.share == pytest.approx(len(one & other) / len(one | other))


def test_below_eight_words_everyday_phrases_would_be_accused():
    item = ["Nadia had 14 pears and gave away 5. How many pears does she have left now?"]
    other = ["Of 90 stamps he sold a third. How many stamps does she have left now?"]
    assert overlaps(item, other, 3) and not overlaps(item, other) and WORDS == 8


def test_what_cannot_be_looked_for_is_refused():
    with pytest.raises(EvaluateError, match="item 1 has no word"):
        overlaps(["a word", "?!"], ["text"])
    with pytest.raises(EvaluateError, match="at least one word"):
        overlaps(["a word"], ["text"], 0)
    with pytest.raises(EvaluateError, match="a share"):
        near_duplicates(["a word"], ["text"], 0.0)
    assert overlaps(["a word"], []) == [] and near_duplicates([], ["text"]) == []
