"""From sources to a corpus: which documents are held out, and which are said twice.

A document is held out by a hash of its id, so the choice neither depends on its neighbours nor changes when a source
grows. Then duplicates go: the same words again, or nearly the same. What is held out must not stand in the training
part in other words, or a measurement on it measures memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import regex

from aquila2_tut import assets
from aquila2_tut.data.corpora import SOURCES, Document, documents, help_pages, jupyterlab_pairs
from aquila2_tut.data.readers import DataError

SPLITS = ("train", "held-out")
HELD_OUT = 0.05  # share of the documents
NEAR = 0.8  # Jaccard similarity of the shingles from which two documents are near duplicates
_PERMUTATIONS = 128
_RULES = 2  # goes up with every change that may change which documents are dropped


def split_of(source: str, id: str) -> str:
    """The split of a document: "train" or "held-out"; the same for a page and its translation.

    Args:
        source: a key of `SOURCES`.
        id: the document's id.
    """
    family = SOURCES[source].family
    digest = hashlib.blake2b(f"{family}/{id}".encode(), digest_size=8).digest()
    return "held-out" if int.from_bytes(digest, "big") < HELD_OUT * 2**64 else "train"


def corpus(split: str, sources: Iterable[str] | None = None) -> Iterator[Document]:
    """The documents of one split, without duplicates, source by source in a fixed order.

    Args:
        split: "train" or "held-out".
        sources: keys of `SOURCES`; None takes all. Duplicates are looked for in all sources either way.

    Raises:
        DataError: there is no such split or source.
        AssetError: an asset has not been fetched yet.
    """
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}; known: {', '.join(SPLITS)}")
    chosen = list(SOURCES) if sources is None else list(sources)
    if unknown := [name for name in chosen if name not in SOURCES]:
        raise DataError(f"there is no source {unknown[0]!r}; known: {', '.join(SOURCES)}")
    dropped = duplicates()
    for source in chosen:
        for document in documents(source):
            if split_of(source, document.id) == split and document.id not in dropped[source]:
                yield document


def aligned_pairs(split: str) -> list[tuple[str, str]]:
    """Sentences that say the same in English and Chinese, out of the documents of one split.

    Args:
        split: "train" or "held-out".

    Returns:
        (English, Chinese), each pair once, in the order of the sources.

    Raises:
        DataError: there is no such split.
        AssetError: an asset has not been fetched yet.
    """
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}; known: {', '.join(SPLITS)}")
    first: dict[tuple[str, str], str] = {}
    for source, id, pair in _all_pairs():
        # A sentence that training has seen anywhere is not held out.
        if first.get(pair) != "train":
            first[pair] = split_of(source, id)
    return [pair for pair, place in first.items() if place == split]


def _all_pairs() -> Iterator[tuple[str, str, tuple[str, str]]]:
    """(source, id of the document, pair)."""
    english = {page: {name: text for name, text in found if name} for page, found in help_pages("en")}
    for page, paragraphs in help_pages("zh"):
        for name, chinese in paragraphs:
            original = english.get(page, {}).get(name)
            if original and original != chinese and regex.search(r"\p{Han}", chinese):
                yield "libreoffice-zh", page, (original, chinese)
    for id, pairs in jupyterlab_pairs():
        yield from (("jupyterlab-zh", id, pair) for pair in pairs)


# --- duplicates ------------------------------------------------------------------------------------------------------


def duplicates() -> dict[str, dict[str, str]]:
    """The documents that `corpus` leaves out. Finding them takes a minute or two; the answer is kept in the cache.

    Returns:
        source -> id -> "exact" or "near"

    Raises:
        AssetError: an asset has not been fetched yet.
    """
    file = assets.home() / "corpora" / f"duplicates-{_fingerprint()}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = find_duplicates(document for source in SOURCES for document in documents(source))
    complete = {source: found.get(source, {}) for source in SOURCES}
    _keep(file, complete)
    return complete


def _fingerprint() -> str:
    """Changes with whatever may change the documents: assets, Python's own docs, the rules."""
    for source in SOURCES.values():
        for name in source.assets:
            assets.path(name)
    sums = [assets.lookup(name).sha256 for source in SOURCES.values() for name in source.assets]
    said = json.dumps([_RULES, HELD_OUT, NEAR, _PERMUTATIONS, platform.python_version(), list(SOURCES), sums])
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def _keep(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".new-")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(value, stream)
    os.replace(name, file)


def find_duplicates(found: Iterable[Document]) -> dict[str, dict[str, str]]:
    """Documents that repeat another one: of each group, the first that is for training stays.

    Args:
        found: documents; ids are unique in their source.

    Returns:
        source -> id -> "exact" or "near"; sources without duplicates are not in it.
    """
    every = sorted(found, key=lambda document: split_of(document.source, document.id) != "train")
    dropped: dict[str, dict[str, str]] = {}
    exact: set[bytes] = set()
    near = _NearIndex()
    for document in every:
        words = normal(document.text)
        digest = hashlib.blake2b(words.encode(), digest_size=16).digest()
        verdict = "exact" if digest in exact else "near" if near.has_or_add(words, document.language) else None
        exact.add(digest)
        if verdict:
            dropped.setdefault(document.source, {})[document.id] = verdict
    return dropped


def normal(text: str) -> str:
    """A text as duplicates see it: letters and digits, small, words apart by one blank."""
    return " ".join(regex.findall(r"[\p{L}\p{N}]+", unicodedata.normalize("NFKC", text).lower()))


def shingles(words: str, language: str) -> set[int]:
    """What two texts have in common is counted in these: three words in a row, or three characters in Chinese.

    Args:
        words: a text as `normal` returns it.
        language: "en" or "zh".

    Returns:
        The shingles as 32-bit numbers.
    """
    units: str | list[str] = words.replace(" ", "") if language == "zh" else words.split()
    glue = "" if language == "zh" else " "
    return {zlib.crc32(glue.join(units[i : i + 3]).encode()) for i in range(max(1, len(units) - 2))}


class _NearIndex:
    """Remembers documents and tells whether a new one is near to any of them."""

    def __init__(self) -> None:
        from datasketch import MinHashLSH

        self._lsh = MinHashLSH(threshold=NEAR - 0.1, num_perm=_PERMUTATIONS)
        self._words: dict[int, tuple[str, str]] = {}

    def has_or_add(self, words: str, language: str) -> bool:
        """Whether a near duplicate is known already; if not, the document is remembered."""
        from datasketch import MinHash

        mine = shingles(words, language)
        sketch = MinHash(num_perm=_PERMUTATIONS, seed=1, hashfunc=int)
        sketch.update_batch(mine)
        # The sketch only names candidates; the shingles themselves decide.
        if any(_similarity(mine, shingles(*self._words[key])) >= NEAR for key in self._lsh.query(sketch)):
            return True
        key = len(self._words)
        self._words[key] = (words, language)
        self._lsh.insert(key, sketch)
        return False


def _similarity(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)
