"""Byte-level byte-pair encoding from scratch: learning the merges, encoding, decoding, in plain Python.

A text becomes tokens in three steps. A pattern cuts it into words, so that no token ever reaches from one word into
the next. Each word becomes its UTF-8 bytes, so that 256 tokens are enough to write anything. Then neighbours are
merged, always the pair that was learned first, until no pair of neighbours is a learned one.

Learning is the same walk in the other direction: count the neighbours in a text, make the most frequent pair a token,
and again. Both walks keep a heap of what could be merged next, so neither looks at the whole text a second time.

Source: Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units" (2016), for the merges;
GPT-2 (2019) for the pattern and for the letters that stand for bytes.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import regex

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A contraction; letters, digits or signs with at most one space before them; or white space, of which the last one is
# left to the word that follows.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# In vocabulary files a token is a string of letters, one for each byte: the byte's own Latin-1 character if that can
# be seen, and otherwise the next free one from U+0100 on. The order of the letters is also the order of the first ids.
_VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
LETTER_OF_BYTE = {byte: chr(byte) for byte in _VISIBLE} | {byte: chr(256 + n) for n, byte in enumerate(_HIDDEN)}
BYTE_OF_LETTER = {letter: byte for byte, letter in LETTER_OF_BYTE.items()}

CACHED_WORDS = 1 << 17
LONGEST_CACHED_WORD = 128  # characters; what is longer hardly comes twice

Pair = tuple[int, int]


class TokenizerError(ValueError):
    """A vocabulary that is missing, broken, or not to be had for this model."""


class Merge(NamedTuple):
    """A pair of tokens that became one, and how often it stood in the training text at that moment."""

    left: bytes
    right: bytes
    count: int


@dataclass(frozen=True)
class Piece:
    """One token of an encoded text.

    Args:
        id: the token's id.
        data: its bytes.
        start: the first character of the text that it has bytes of.
        end: one after the last such character. Tokens that share a character overlap.
    """

    id: int
    data: bytes
    start: int
    end: int

    @property
    def text(self) -> str | None:
        """The token as text; None if it begins or ends inside a character."""
        try:
            return self.data.decode()
        except UnicodeDecodeError:
            return None


def repair(text: str) -> str:
    """A text that UTF-8 can write. Python strings may hold halves of UTF-16 pairs, as broken JSON escapes leave them.

    Returns:
        The text itself if nothing is wrong with it; otherwise two halves that belong together are one character, and
        each lone half is U+FFFD.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def to_letters(data: bytes) -> str:
    """Bytes as the letters that stand for them in a vocabulary file: b"a b" is "aĠb"."""
    return data.decode("latin-1").translate(LETTER_OF_BYTE)


def to_bytes(token: str) -> bytes:
    """The bytes that a token of a vocabulary file means. A control token is not written in letters: it means itself."""
    try:
        return bytes(BYTE_OF_LETTER[letter] for letter in token)
    except KeyError:
        return token.encode()


# --- learning --------------------------------------------------------------------------------------------------------


def count_words(texts: Iterable[str], pattern: str = GPT2_PATTERN) -> Counter[str]:
    """How often each word stands in the texts."""
    split = regex.compile(pattern).findall
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split(repair(text)))
    return counts


def learn_merges(words: Mapping[str, int], vocab_size: int) -> Iterator[Merge]:
    """Merge the most frequent pair of neighbours, again and again; of equally frequent ones, that of the lowest ids.

    Args:
        words: how often each word occurs. Merges never cross from one word into the next.
        vocab_size: stop when there are so many tokens, the 256 bytes among them.

    Yields:
        The merges in the order in which they are learned; fewer than asked for if every word is one token.
    """
    tokens = [bytes([byte]) for byte in LETTER_OF_BYTE]
    id_of_byte = {byte: index for index, byte in enumerate(LETTER_OF_BYTE)}
    corpus = _Corpus({tuple(id_of_byte[byte] for byte in word.encode()): times for word, times in words.items()})
    while len(tokens) < vocab_size and (best := corpus.most_frequent()):
        pair, count = best
        left, right = tokens[pair[0]], tokens[pair[1]]
        corpus.merge(pair, len(tokens))
        tokens.append(left + right)
        yield Merge(left, right, count)


class _Corpus:
    """Words as lists of ids, and the counts of their pairs of neighbours, kept up to date.

    Args:
        words: the ids of each word, and how often it occurs.
    """

    def __init__(self, words: Mapping[tuple[int, ...], int]) -> None:
        self.words = [list(word) for word in words]
        self.times = list(words.values())
        self.counts: Counter[Pair] = Counter()
        self.where: defaultdict[Pair, set[int]] = defaultdict(set)  # may name a word that has lost the pair since
        for index in range(len(self.words)):
            self._count(index)
        self.heap = [(-count, pair) for pair, count in self.counts.items()]
        heapify(self.heap)

    def _count(self, index: int) -> None:
        for pair in pairwise(self.words[index]):
            self.counts[pair] += self.times[index]
            self.where[pair].add(index)

    def most_frequent(self) -> tuple[Pair, int] | None:
        """The pair to merge next and its count; None if no pair is left."""
        while self.heap:
            claimed, pair = heappop(self.heap)
            count = self.counts[pair]
            if count == -claimed and count > 0:
                return pair, count
            if count > 0:  # merges of other pairs took some away since; put it back where it belongs
                heappush(self.heap, (-count, pair))
        return None

    def merge(self, pair: Pair, new: int) -> None:
        """Replace a pair by a new id in every word that has it. Only those words are looked at."""
        made: set[Pair] = set()
        for index in self.where.pop(pair):
            for old in pairwise(self.words[index]):
                self.counts[old] -= self.times[index]
            self.words[index] = replace_pair(self.words[index], pair, new)
            self._count(index)
            made.update(fresh for fresh in pairwise(self.words[index]) if new in fresh)
        for fresh in made:
            heappush(self.heap, (-self.counts[fresh], fresh))


def replace_pair(word: Sequence[int], pair: Pair, new: int) -> list[int]:
    """The word with every occurrence of a pair, from left to right, replaced by one id."""
    result: list[int] = []
    at = 0
    while at < len(word):
        found = tuple(word[at : at + 2]) == pair
        result.append(new if found else word[at])
        at += 2 if found else 1
    return result


# --- encoding --------------------------------------------------------------------------------------------------------


class BytePairEncoding:
    """A vocabulary and its merges, ready to encode and decode. Typed text is text: no control token is ever made.

    Args:
        vocab: the id of each token, tokens in the letters of vocabulary files.
        merges: pairs of tokens in the order in which they were learned.
        pattern: a regular expression, without groups that capture, that finds the words of a text. What it does not
            find is lost, so it must find everything.

    Raises:
        TokenizerError: the vocabulary lacks one of the 256 bytes, or a merge's parts or result.
    """

    def __init__(
        self, vocab: Mapping[str, int], merges: Iterable[tuple[str, str]], pattern: str = GPT2_PATTERN
    ) -> None:
        self.vocab, self.merges, self.pattern = dict(vocab), list(merges), pattern
        lacking = [byte for byte, letter in LETTER_OF_BYTE.items() if letter not in self.vocab]
        if lacking:
            raise TokenizerError(
                f"the vocabulary lacks {len(lacking)} of the 256 bytes, the first of them {lacking[0]:#04x}"
            )
        self._id_of_byte = [self.vocab[LETTER_OF_BYTE[byte]] for byte in range(256)]
        self._bytes_of_id = {index: to_bytes(token) for token, index in self.vocab.items()}
        self._rank, self._result = _rank_table(self.vocab, self.merges)
        self._split = regex.compile(pattern).findall
        self._known = _Cache(lambda word: self.merge(word.encode()))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, pattern: str = GPT2_PATTERN) -> BytePairEncoding:
        """Learn a vocabulary from texts.

        Args:
            texts: the training texts; they are counted one by one, never held together.
            vocab_size: tokens to learn, the 256 bytes among them; fewer if the texts do not have as many.
            pattern: how a text is cut into words.

        Raises:
            TokenizerError: `vocab_size` is below 256.
        """
        if vocab_size < len(LETTER_OF_BYTE):
            raise TokenizerError(f"a vocabulary of {vocab_size} tokens cannot hold the 256 bytes: ask for 256 or more")
        merges = [
            (to_letters(left), to_letters(right))
            for left, right, _ in learn_merges(count_words(texts, pattern), vocab_size)
        ]
        tokens = [*LETTER_OF_BYTE.values(), *(left + right for left, right in merges)]
        return cls({token: index for index, token in enumerate(tokens)}, merges, pattern)

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerFast) -> BytePairEncoding:
        """The vocabulary and the merges of a tokenizer such as ``load_tokenizer("Aquila2-7B")``, to encode in Python.

        Raises:
            TokenizerError: it is no byte-level BPE, or it does not cut words by GPT-2's pattern alone.
        """
        data = json.loads(tokenizer.backend_tokenizer.to_str())
        cut = data["pre_tokenizer"] or {}
        by_gpt2 = (cut.get("type"), cut.get("add_prefix_space"), cut.get("use_regex")) == ("ByteLevel", False, True)
        if data["model"]["type"] != "BPE" or data["normalizer"] or not by_gpt2:
            raise TokenizerError(
                f"{tokenizer.name_or_path or 'this tokenizer'} is no byte-level BPE with GPT-2's pattern: its model is "
                f"{data['model']['type']}, its pre-tokenizer {cut.get('type')}"
            )
        return cls(tokenizer.get_vocab(), [(left, right) for left, right in data["model"]["merges"]])

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, control tokens included."""
        return len(self.vocab)

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Lone halves of UTF-16 pairs are replaced first; see `repair`."""
        words = self._split(repair(text))
        return list(chain.from_iterable(map(self._known.__getitem__, words)))

    def merge(self, data: bytes) -> list[int]:
        """The ids of one word, not from the cache.

        A heap holds the places where a learned pair stands, the earliest learned on top; `after` and `before` link each
        token to its neighbours, so a merge costs the same wherever it happens. n bytes take n log n steps.

        Args:
            data: the word in UTF-8.
        """
        ids = [self._id_of_byte[byte] for byte in data]
        after, before = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))
        rank = self._rank.get
        heap = [(found, at) for at, pair in enumerate(pairwise(ids)) if (found := rank(pair)) is not None]
        heapify(heap)
        while heap:
            best, at = heappop(heap)
            gone = after[at]
            if gone >= len(ids) or rank((ids[at], ids[gone])) != best:  # one of the two was merged away before
                continue
            ids[at], ids[gone] = self._result[best], -1
            left, right = before[at], after[gone]
            after[at] = right
            if right < len(ids):
                before[right] = at
                if (found := rank((ids[at], ids[right]))) is not None:
                    heappush(heap, (found, at))
            if left >= 0 and (found := rank((ids[left], ids[at]))) is not None:
                heappush(heap, (found, left))
        return [index for index in ids if index >= 0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Bytes that are no UTF-8, as a text cut inside a character leaves them, become U+FFFD.

        Raises:
            TokenizerError: an id that the vocabulary does not have.
        """
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids.

        Raises:
            TokenizerError: an id that the vocabulary does not have.
        """
        try:
            return b"".join([self._bytes_of_id[index] for index in ids])
        except KeyError as error:
            raise TokenizerError(f"the vocabulary of {self.vocab_size:,} tokens has no id {error.args[0]}") from error

    def pieces(self, text: str) -> list[Piece]:
        """The tokens of a text with their bytes and their places in it (in the repaired text, see `repair`)."""
        text = repair(text)
        owner = [at for at, character in enumerate(text) for _ in character.encode()]
        found, first = [], 0
        for index in self.encode(text):
            data = self._bytes_of_id[index]
            last = first + len(data) - 1
            found.append(Piece(index, data, owner[first], owner[last] + 1))
            first = last + 1
        return found

    def save(self, folder: str | Path) -> None:
        """Write vocab.json and merges.txt, the two files that `load`, `load_tokenizer` and transformers read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(self.vocab, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *map(" ".join, self.merges), ""]
        (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, folder: str | Path, pattern: str = GPT2_PATTERN) -> BytePairEncoding:
        """Read vocab.json and merges.txt.

        Raises:
            TokenizerError: a file that is absent or broken.
        """
        vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        if not (vocab.is_file() and merges.is_file()):
            raise TokenizerError(f"{folder}: vocab.json and merges.txt are not both there")
        return cls(read_json(vocab), read_merges(merges), pattern)


def _rank_table(vocab: Mapping[str, int], merges: Iterable[tuple[str, str]]) -> tuple[dict[Pair, int], list[int]]:
    """Pair of ids -> place in the order of merges, and place -> id of what the pair becomes."""
    rank, result = {}, []
    for place, (left, right) in enumerate(merges):
        try:
            rank[vocab[left], vocab[right]] = place
            result.append(vocab[left + right])
        except KeyError as error:
            raise TokenizerError(f"merge {place}, {left!r} + {right!r}: {error.args[0]!r} is no token") from error
    return rank, result


class _Cache(dict[str, list[int]]):
    """Word -> ids, worked out when first asked for. A dict, because a dict's own lookup is not a Python call.

    Args:
        work: what gives the ids of a word.
    """

    def __init__(self, work: Callable[[str], list[int]]) -> None:
        super().__init__()
        self.work = work

    def __missing__(self, word: str) -> list[int]:
        ids = self.work(word)
        if len(word) <= LONGEST_CACHED_WORD:
            if len(self) >= CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids


def read_merges(file: Path) -> list[tuple[str, str]]:
    """One merge a line, two parts with a space between; a first line that starts with #version is a header.

    Raises:
        TokenizerError: a line that is something else.
    """
    merges = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = tuple(line.rstrip("\r").split(" "))
        if len(parts) != 2:
            raise TokenizerError(f"{file}, line {number}: {line!r} is not two parts with one space between them")
        merges.append(parts)
    return merges


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        TokenizerError: it is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{file}: not valid JSON, perhaps cut short: {error}. Fetch it again.") from error
