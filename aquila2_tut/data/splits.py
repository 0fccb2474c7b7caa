"""From sources to a corpus: which documents are held out, and which are said twice.

A document is held out by a hash of its id, so the choice neither depends on its neighbours nor changes when a source
grows. Then duplicates go: the same words again, or nearly the same. What is held out must not stand in the training
part in other words, or a measurement on it measures memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
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
from aquila2_tut.data.corpora import SOURCES, Document, documents, help_pages, jupyterlab_pairs, source_named
from aquila2_tut.data.readers import DataError, Paragraph

SPLITS = ("train", "held-out")
HELD_OUT = 0.05  # share of the documents
NEAR = 0.8  # Jaccard similarity of the shingles from which two documents are near duplicates
_PERMUTATIONS = 128
_Pages = dict[str, list[Paragraph]]  # by path
_RULES = 4  # goes up with every change that may change which documents are dropped


def split_of(source: str, id: str) -> str:
    """The split of a document: "train" or "held-out"; the same for a page and its translation.

    Args:
        source: a key of `SOURCES`.
        id: the document's id.
    """
    family = source_named(source).family
    digest = hashlib.blake2b(f"{family}/{id}".encode(), digest_size=8).digest()
    return "held-out" if int.from_bytes(digest, "big") < HELD_OUT * 2**64 else "train"


def corpus(split: str, sources: Iterable[str] | None = None) -> Iterator[Document]:
    """The documents of one split, without duplicates, source by source in a fixed order.

    Args:
        split: "train" or "held-out".
        sources: keys of `SOURCES`; None takes all.

    Raises:
        DataError: there is no such split or source.
        AssetError: an asset has not been fetched yet.
    """
    _check(split)
    for source in SOURCES if sources is None else sources:
        dropped = duplicates(source)
        for document in documents(source):
            if split_of(source, document.id) == split and document.id not in dropped:
                yield document


def _check(split: str) -> None:
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}; known: {', '.join(SPLITS)}")


def aligned_pairs(split: str) -> list[tuple[str, str]]:
    """Sentences that say the same in English and Chinese, out of the documents of one split.

    A sentence belongs to the page that says it first, as in `documents`. So no sentence of one split, in either
    language, is among the pairs of the other.

    Args:
        split: "train" or "held-out".

    Returns:
        (English, Chinese), each pair once, in the order of the sources.

    Raises:
        DataError: there is no such split.
        AssetError: an asset has not been fetched yet.
    """
    _check(split)
    pages = {language: help_pages(language) for language in ("en", "zh")}
    messages = list(jupyterlab_pairs())
    home: dict[str, str] = {}
    for page, paragraphs in [*pages["en"].items(), *pages["zh"].items()]:
        for paragraph in paragraphs:
            home.setdefault(paragraph.text, split_of("libreoffice-zh", page))
    for id, pairs in messages:
        for sentence in itertools.chain(*pairs):
            home.setdefault(sentence, split_of("jupyterlab-zh", id))
    found = itertools.chain(_help_pairs(pages["en"], pages["zh"]), *(pairs for _, pairs in messages))
    return [pair for pair in dict.fromkeys(found) if home[pair[0]] == home[pair[1]] == split]


def _help_pairs(english: _Pages, chinese: _Pages) -> Iterator[tuple[str, str]]:
    """Paragraphs of the same page with the same id, if they were translated."""
    for page, paragraphs in chinese.items():
        originals = {name: text for name, text in english.get(page, []) if name}
        for name, text in paragraphs:
            if name in originals and text != originals[name] and regex.search(r"\p{Han}", text):
                yield originals[name], text


# --- duplicates ------------------------------------------------------------------------------------------------------


def duplicates(source: str) -> dict[str, str]:
    """The documents that `corpus` leaves out because another one of their source says the same.

    The sources have nothing in common that would make it worth while to compare them with each other, and each can be
    used without the others. Finding the duplicates takes up to ten seconds; the answer is kept in the cache.

    Args:
        source: a key of `SOURCES`.

    Returns:
        id -> "exact" or "near"

    Raises:
        DataError: there is no such source.
        AssetError: an asset has not been fetched yet.
    """
    file = assets.home() / "corpora" / f"duplicates-{source}-{_fingerprint(source)}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        dropped = find_duplicates(documents(source))
    _keep(file, dropped)
    return dropped


def _fingerprint(source: str) -> str:
    """Changes with whatever may change the documents: assets, Python's own docs, the rules."""
    sums = [assets.lookup(name).sha256 for name in source_named(source).assets]
    said = json.dumps([_RULES, HELD_OUT, NEAR, _PERMUTATIONS, platform.python_version(), sums])
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def _keep(file: Path, value: Any) -> None:
    # A cache that cannot be written still serves: the same is found again each time.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".new-")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(value, stream)
        os.replace(name, file)


def find_duplicates(found: Iterable[Document]) -> dict[str, str]:
    """Documents that repeat another one: of each group, the first that is for training stays.

    Args:
        found: documents of one source.

    Returns:
        id -> "exact" or "near"
    """
    training_first = sorted(found, key=lambda document: split_of(document.source, document.id) != "train")
    dropped: dict[str, str] = {}
    exact: set[str] = set()
    near = _NearIndex()
    for document in training_first:
        words = normal(document.text)
        if words in exact:
            dropped[document.id] = "exact"
        elif near.has_or_add(words, document.language):
            dropped[document.id] = "near"
        exact.add(words)
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
        try:
            from datasketch import MinHashLSH
        except ImportError as error:
            raise DataError("duplicates are found with datasketch: pip install 'aquila2-tut[train]'") from error
        self._lsh = MinHashLSH(threshold=NEAR - 0.2, num_perm=_PERMUTATIONS)
        self._words: dict[int, tuple[str, str]] = {}

    def has_or_add(self, words: str, language: str) -> bool:
        """Whether a near duplicate is known already; if not, the document is remembered."""
        from datasketch import MinHash

        mine = shingles(words, language)
        sketch = MinHash(num_perm=_PERMUTATIONS, seed=1, hashfunc=int)
        sketch.update_batch(mine)
        # The sketch only names candidates, of which few are missed so far below the threshold; the shingles decide.
        if any(_similarity(mine, shingles(*self._words[key])) >= NEAR for key in self._lsh.query(sketch)):
            return True
        key = len(self._words)
        self._words[key] = (words, language)
        self._lsh.insert(key, sketch)
        return False


def _similarity(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)
