"""Whether a corpus holds items of a benchmark: word for word in part, or nearly so as a whole.

Two looks, as each sees what the other does not. An n-gram that both share finds a copied question inside of a long
document; near-duplicates find one of which some words were changed everywhere. Neither finds a translation or a
paraphrase: no finding is no proof. What is found is to be read, which is why each finding quotes what is shared.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import regex

from aquila2_tut.evaluate.errors import EvaluateError

# Source: Brown et al. 2020 (arXiv 2005.14165), appendix C: 13 words for most sets, at least 8. A phrase of everyday
# life has seldom more; with fewer, "how many are left in the" would accuse every sum. A character of Chinese counts as
# one token, and 13 make a clause, as 8 English words do: so texts of both languages have their own n below.
WORDS, CHARACTERS = 8, 13
# With one word in p changed, about (1 - 1/p)^4 of the shingles stay, s, and s / (2 - s) of those of either text are in
# both: a half, when one word in ten is changed. Questions that one template made share less, if it leaves much open: of
# 60 arithmetic, kinship or bAbI 15 questions against 200 others, no pair more than 0.33. Bookings, which are all one
# form, share up to 0.67: for items like those the threshold has to be higher.
ALIKE = 0.5
_SHINGLE = 4
_TOKEN = regex.compile(r"\p{Han}|[\p{L}\p{N}]+")


class Finding(NamedTuple):
    """One item that a document holds.

    Attributes:
        item: its index.
        document: index of the document.
        kind: "n-gram" or "near-duplicate".
        share: of the item's n-grams, those in the document; or of the shingles of either, those that both have.
        quoted: the longest stretch in common, in small letters and without punctuation; "" for near-duplicates.
    """

    item: int
    document: int
    kind: str
    share: float
    quoted: str


def tokens(text: str) -> list[str]:
    """What is compared: words in small letters, and single Chinese characters, without punctuation and layout."""
    return _TOKEN.findall(text.casefold())


def _length(words: Sequence[str]) -> int:
    """The n for a text: by what most of it is written in."""
    return CHARACTERS if 2 * sum(regex.match(r"\p{Han}", word) is not None for word in words) > len(words) else WORDS


def _grams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """The n-grams of a text; one that is shorter has itself as its only one."""
    return (tuple(words[at : at + n]) for at in range(max(1, len(words) - n + 1)))


def overlaps(items: Sequence[str], corpus: Iterable[str], n: int | None = None) -> list[Finding]:
    """Items of which the corpus holds an n-gram, word for word.

    Args:
        items: the benchmark's questions, without what all of them begin with; shorter ones than n are looked for whole.
        corpus: the documents; they are read once, one at a time.
        n: tokens that have to be the same in a row; by default 8 words, or 13 characters of Chinese.

    Raises:
        EvaluateError: an item without a word, or an n below 1.
    """
    if n is not None and n < 1:
        raise EvaluateError(f"n-grams have at least one word, not {n}")
    words = [tokens(item) for item in items]
    if empty := [index for index, item in enumerate(words) if not item]:
        raise EvaluateError(f"item {empty[0]} has no word: leave it out")
    lengths = [min(n or _length(item), len(item)) for item in words]
    wanted: dict[tuple[str, ...], set[int]] = {}
    for index, (item, length) in enumerate(zip(words, lengths, strict=True)):
        for gram in _grams(item, length):
            wanted.setdefault(gram, set()).add(index)
    found = []
    for number, document in enumerate(corpus):
        seen = _seen(tokens(document), sorted(set(lengths)), wanted)
        for index in sorted(set().union(*(wanted[gram] for gram in seen))):
            found.append(_overlap(index, number, words[index], lengths[index], seen))
    return found


def _seen(document: Sequence[str], lengths: Sequence[int], wanted: dict[tuple[str, ...], set[int]]) -> set:
    return {gram for n in lengths if n <= len(document) for gram in _grams(document, n) if gram in wanted}


def _overlap(index: int, number: int, words: Sequence[str], n: int, seen: set) -> Finding:
    hits = [gram in seen for gram in _grams(words, n)]
    best, begin = (0, 0), None
    for at, hit in enumerate([*hits, False]):
        if hit:
            begin = at if begin is None else begin
        elif begin is not None:
            best, begin = max(best, (at - begin, -begin)), None
    first = -best[1]
    return Finding(index, number, "n-gram", sum(hits) / len(hits), " ".join(words[first : first + best[0] + n - 1]))


def near_duplicates(items: Sequence[str], corpus: Iterable[str], alike: float = ALIKE) -> list[Finding]:
    """Items that a document of the corpus is nearly, as a whole: some words are others.

    MinHash makes of each text 128 numbers, of which as many agree as shingles do in both; an index finds those that
    may be alike without comparing each with each. What it finds is then counted exactly, so that nothing is accused
    that is below the threshold. Documents far longer than an item cannot be like it: cut them into paragraphs.

    Args:
        items: the benchmark's, with their answers if the corpus has them too.
        corpus: paragraphs, or samples of a training set.
        alike: from 0 to 1, the share of shingles that both have, from which two texts count as the same.

    Raises:
        EvaluateError: datasketch is not installed, or a threshold that is none.

    Source: Broder 1997 (doi 10.1109/SEQUEN.1997.666900), as datasketch does it.
    """
    if not 0 < alike <= 1:
        raise EvaluateError(f"the threshold is a share, above 0 and at most 1, not {alike}")
    try:
        from datasketch import MinHashLSH
    except ImportError as error:
        raise EvaluateError("near-duplicates are found with datasketch: pip install 'aquila2-tut[train]'") from error
    # The index looks a little below the threshold, as its estimate is one; 0.15 are two standard deviations of it.
    index = MinHashLSH(threshold=max(0.1, alike - 0.15), num_perm=128)
    shingles = [_shingles(item) for item in items]
    for number, item in enumerate(shingles):
        index.insert(number, _minhash(item))
    found = []
    for number, document in enumerate(map(_shingles, corpus)):
        for item in sorted(index.query(_minhash(document))):
            share = len(shingles[item] & document) / len(shingles[item] | document)
            if share >= alike:
                found.append(Finding(item, number, "near-duplicate", share, ""))
    return found


def _shingles(text: str) -> set[tuple[str, ...]]:
    return set(_grams(tokens(text), _SHINGLE))


def _minhash(shingles: set[tuple[str, ...]]) -> object:
    from datasketch import MinHash

    made = MinHash(num_perm=128, seed=1, hashfunc=zlib.crc32)
    made.update_batch([" ".join(shingle).encode("utf-8", "replace") for shingle in shingles])
    return made
