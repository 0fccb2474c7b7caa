"""A language model made of counts: what a small neural one must beat to be worth its training.

Interpolated modified Kneser-Ney smoothing. The longest context that was seen has the first say; what it holds back goes
to the next shorter one. A shorter n-gram counts not how often it was seen but after how many different tokens: "York"
is frequent, and yet says little about what follows anything but "New".

Each n-gram is a number: that of its first n-1 tokens, times the size of the vocabulary, plus its last token. So an
order is one sorted array, whatever n is, and millions of them are looked up together.

Source: Chen & Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling", TR-10-98, section 3;
n-grams at the beginning of a text keep their plain counts, as in Heafield et al. 2013.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from aquila2_tut.evaluate.errors import EvaluateError

FALLBACK = np.array([0.0, 0.5, 1.0, 1.5])  # discounts where there is too little text to estimate them


@dataclass(frozen=True)
class _Order:
    """All n-grams of one n.

    Args:
        keys: (G,) int64, sorted; see the module.
        shares: (G,) float32, the probability of the last token after the others, less what is held back.
        rest: (contexts,) float32, what is held back after each (n-1)-gram, for the shorter context to give away.
    """

    keys: np.ndarray
    shares: np.ndarray
    rest: np.ndarray

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The number of each n-gram, -1 where it was never seen."""
        places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[places] == keys, places, -1)


class NGram:
    """Probabilities of token sequences, learned by counting.

    Args:
        sequences: token ids of each training text, the first of them the same everywhere and nowhere else. It is only
            ever a context.
        vocab_size: V; every token below it gets some probability, seen or not.
        order: n, the tokens that an n-gram has at most; the last is predicted from the others.

    Raises:
        EvaluateError: an order below 2, no text, a token outside the vocabulary, or a first token that is not special.
    """

    def __init__(self, sequences: Iterable[Sequence[int]], vocab_size: int, order: int = 5) -> None:
        if order < 2:
            raise EvaluateError(f"the order must be at least 2, not {order}")
        self.order, self.vocab_size = order, vocab_size
        tokens, places = self._joined(sequences)
        self._check_first(tokens, places)
        self._unigrams = np.zeros(vocab_size)
        self._orders: list[_Order] = []
        self._count(tokens, places)

    def _joined(self, sequences: Iterable[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """All tokens one behind the other, and the place of each in its sequence, both (N,)."""
        arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        if not arrays or not all(map(len, arrays)):
            raise EvaluateError("there are no texts, or one has no token: each needs at least the one that begins it")
        tokens = np.concatenate(arrays)
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise EvaluateError(f"token {tokens.max()} is outside the vocabulary of {self.vocab_size}")
        return tokens, np.concatenate([np.arange(len(array)) for array in arrays])

    def _check_first(self, tokens: np.ndarray, places: np.ndarray) -> None:
        self.bos = int(tokens[0])
        if not np.array_equal(tokens == self.bos, places == 0):
            raise EvaluateError(f"every text must begin with the same token, here {self.bos}, and have it nowhere else")

    def _count(self, tokens: np.ndarray, places: np.ndarray) -> None:
        """Goes up from unigrams; when n-grams are known, so is how many tokens stand before each (n-1)-gram."""
        size = self.vocab_size
        keys, counts = np.arange(size), np.bincount(tokens, minlength=size)
        begins = keys == self.bos
        contexts, numbers = 1, tokens  # numbers: of the n-gram that ends at each token
        for n in range(2, self.order + 1):
            at = np.flatnonzero(places >= n - 1)
            longer, which, seen = np.unique(
                numbers[at - 1] * size + tokens[at], return_inverse=True, return_counts=True
            )
            ending, first = np.empty(len(longer), dtype=np.int64), np.zeros(len(longer), dtype=bool)
            ending[which] = numbers[at]
            first[which] = places[at] == n - 1
            befores = np.bincount(ending, minlength=len(keys))
            self._add(keys, np.where(begins, counts, befores), contexts)
            contexts, numbers = len(keys), _at(at, which, len(tokens))
            keys, counts, begins = longer, seen, first
        self._add(keys, counts, contexts)

    def _add(self, keys: np.ndarray, counts: np.ndarray, contexts: int) -> None:
        """Turns the counts of an order into probabilities."""
        if contexts == 1:
            self._unigrams = self._add_unigrams(counts)
            return
        parents, discounts = keys // self.vocab_size, estimate_discounts(counts)[counts.clip(max=3)]
        totals = np.bincount(parents, counts, minlength=contexts)
        held = np.bincount(parents, discounts, minlength=contexts)
        # After the end of a text nothing was ever seen: all is left to the shorter context.
        rest = np.divide(held, totals, out=np.ones(contexts), where=totals > 0)
        shares = (counts - discounts) / totals[parents]
        self._orders.append(_Order(keys, shares.astype(np.float32), rest.astype(np.float32)))

    def _add_unigrams(self, counts: np.ndarray) -> np.ndarray:
        """(V,) probabilities without context; what is held back is for all tokens alike."""
        counts = np.where(np.arange(self.vocab_size) == self.bos, 0, counts)
        discounts = estimate_discounts(counts)[counts.clip(max=3)]
        found = (counts - discounts + discounts.sum() / (self.vocab_size - 1)) / counts.sum()
        found[self.bos] = 0
        return found

    def bits(self, sequences: Iterable[Sequence[int]]) -> np.ndarray:
        """What it takes to say each sequence, given its first token.

        Args:
            sequences: token ids, the first as in training.

        Returns:
            (sequences,) bits.
        """
        tokens, places = self._joined(sequences)
        chances = self._chances(tokens, places)
        chances[places == 0] = 1
        return np.bincount(np.cumsum(places == 0) - 1, -np.log2(chances))

    def distribution(self, context: Sequence[int]) -> np.ndarray:
        """(V,) probabilities of the token after a context, whose first token is that of a text."""
        continued = [[*context, token] for token in range(self.vocab_size)]
        return self._chances(*self._joined(continued)).reshape(self.vocab_size, -1)[:, -1]

    def _chances(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        """(N,) probability of each token after those before it in its sequence, from the shortest context up."""
        chances, numbers = self._unigrams[tokens], tokens
        for n, order in enumerate(self._orders, 2):
            at = np.flatnonzero(places >= n - 1)
            at = at[numbers[at - 1] >= 0]
            contexts = numbers[at - 1]
            found = order.find(contexts * self.vocab_size + tokens[at])
            chances[at] = np.where(found >= 0, order.shares[found], 0) + order.rest[contexts] * chances[at]
            numbers = _at(at, found, len(tokens))
        return chances


def _at(places: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """(size,) values at their places, -1 elsewhere."""
    filled = np.full(size, -1)
    filled[places] = values
    return filled


def estimate_discounts(counts: np.ndarray) -> np.ndarray:
    """What modified Kneser-Ney smoothing takes from a count of 0, of 1, of 2, and of 3 or more.

    Args:
        counts: (G,) of the n-grams of one order.

    Returns:
        (4,) discounts, the first 0; `FALLBACK` where some small count does not occur or the estimates make no sense.

    Source: Chen & Goodman 1998, equation 26.
    """
    n1, n2, n3, n4 = (int((counts == count).sum()) for count in (1, 2, 3, 4))
    if not n1 * n2 * n3:
        return FALLBACK
    share = n1 / (n1 + 2 * n2)
    found = np.array([0, 1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3])
    return found if (found >= 0).all() else FALLBACK


BYTES = 258  # the vocabulary of `byte_sequence`


def byte_sequence(text: str, end: bool = True) -> list[int]:
    """A text for a model of bytes: 256, its bytes in UTF-8, and 257 at its end if that is wanted."""
    return [256, *text.encode("utf-8"), *([257] if end else [])]
