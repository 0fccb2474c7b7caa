"""The n-gram model against the formulas of Chen & Goodman, written out one n-gram at a time in exact fractions."""

from collections import Counter
from fractions import Fraction
from functools import cache
from random import Random

import numpy as np
import pytest

from aquila2_tut.evaluate import EvaluateError, NGram, byte_sequence
from aquila2_tut.evaluate.ngram import BYTES, FALLBACK, estimate_discounts

VOCAB, BOS, EOS = 12, 10, 11


def texts(seed, count=60):
    """Random sequences with habits: a token often follows its neighbour, so that n-grams of every length repeat."""
    dice = Random(seed)
    made = []
    for _ in range(count):
        row = [dice.randrange(9)]
        while len(row) < dice.randint(2, 14):
            row.append((row[-1] * 2 + 1) % 9 if dice.random() < 0.6 else dice.randrange(9))
        made.append([BOS, *row, EOS])
    return made


class Reference:
    """Modified Kneser-Ney by its definition: counts in dictionaries, probabilities by recursion, fractions."""

    def __init__(self, sequences, order):
        self.order = order
        self.discounts, self.probability = cache(self._discounts), cache(self._probability)
        seen = Counter(
            tuple(row[i : i + n]) for row in sequences for n in range(1, order + 1) for i in range(len(row) - n + 1)
        )
        self.counts = {}
        for gram, count in seen.items():
            if len(gram) == order or gram[0] == BOS:
                self.counts[gram] = count
            else:
                self.counts[gram] = len({other[0] for other in seen if other[1:] == gram})
        del self.counts[(BOS,)]

    def _discounts(self, n):
        tally = Counter(count for gram, count in self.counts.items() if len(gram) == n)
        if not (tally[1] and tally[2] and tally[3]):
            return Fraction(1, 2), Fraction(1), Fraction(3, 2)
        y = Fraction(tally[1], tally[1] + 2 * tally[2])
        found = [i - (i + 1) * y * Fraction(tally[i + 1], tally[i]) for i in (1, 2, 3)]
        return tuple(found) if min(found) >= 0 else (Fraction(1, 2), Fraction(1), Fraction(3, 2))

    def _probability(self, gram):
        n, context = len(gram), gram[:-1]
        after = {other: c for other, c in self.counts.items() if len(other) == n and other[:-1] == context}
        shorter = self.probability(gram[1:]) if n > 1 else Fraction(int(gram[0] != BOS), VOCAB - 1)
        if not after:
            return shorter
        discount = self.discounts(n)
        held = sum(discount[min(c, 3) - 1] for c in after.values())
        own = self.counts.get(gram, 0)
        kept = own - discount[min(own, 3) - 1] if own else 0
        return (kept + held * shorter) / sum(after.values())

    def of(self, row, place):
        return self.probability(tuple(row[max(0, place - self.order + 1) : place + 1]))


@pytest.mark.parametrize(("seed", "order", "count"), [(0, 2, 60), (1, 3, 60), (2, 5, 60), (3, 3, 3), (4, 4, 200)])
def test_probabilities_are_those_of_the_definition(seed, order, count):
    training, fresh = texts(seed, count), texts(seed + 100, 12)
    model, reference = NGram(training, VOCAB, order), Reference(training, order)
    for row in [*fresh, [BOS, 9, 9, 3], *training[:3]]:
        expected = [float(reference.of(row, place)) for place in range(1, len(row))]
        assert model.bits([row])[0] == pytest.approx(-np.log2(expected).sum(), rel=1e-6)
        for place in range(1, len(row)):
            whole = model.distribution(row[:place])
            assert whole[row[place]] == pytest.approx(expected[place - 1], rel=1e-6)


def test_the_estimated_discounts_are_tried_and_not_only_the_fallback():
    reference = Reference(texts(4, 200), 4)
    assert all(reference.discounts(n) != (Fraction(1, 2), Fraction(1), Fraction(3, 2)) for n in (2, 3, 4))


def test_every_distribution_sums_to_one():
    model = NGram(texts(5), VOCAB, 4)
    for context in ([BOS], [BOS, 1], [BOS, 1, 3, 7], [BOS, 9, 9, 9], [BOS, 2, 5, 2, 5, EOS]):
        whole = model.distribution(context)
        assert whole.sum() == pytest.approx(1, abs=1e-6)
        assert whole[BOS] == 0
        assert (np.delete(whole, BOS) > 0).all()


def test_a_batch_is_what_its_rows_are_alone():
    model, rows = NGram(texts(6), VOCAB, 3), texts(7, 20)
    assert model.bits(rows) == pytest.approx([model.bits([row])[0] for row in rows])


def test_a_frequent_token_with_one_neighbour_counts_little_after_others():
    """What the method is known for: "York" is frequent, but only after "New"."""
    new, york, other = 0, 1, 2
    rows = [[BOS, new, york, EOS]] * 20 + [[BOS, place, other, EOS] for place in (3, 4, 5, 6)]
    whole = NGram(rows, VOCAB, 2).distribution([BOS, 7])
    assert whole[other] > 2 * whole[york]


def test_discounts_by_hand():
    # n1 = 4, n2 = 2, n3 = 1, n4 = 0: Y = 4 / 8, D1 = 1 - 2 Y 2/4, D2 = 2 - 3 Y 1/2, D3 = 3 - 4 Y 0
    assert estimate_discounts(np.array([1, 1, 1, 1, 2, 2, 3, 9, 0])) == pytest.approx([0, 0.5, 1.25, 3])
    assert estimate_discounts(np.array([1, 1, 2])) is FALLBACK


def test_bytes():
    assert byte_sequence("aé中") == [256, 97, 0xC3, 0xA9, 0xE4, 0xB8, 0xAD, 257]
    assert byte_sequence("a", end=False) == [256, 97]
    model = NGram([byte_sequence("abcabc"), byte_sequence("中文")], BYTES, 4)
    assert model.distribution([256]).sum() == pytest.approx(1, abs=1e-6)
    assert np.isfinite(model.bits([byte_sequence("zx☃", end=False)])).all()


@pytest.mark.parametrize(
    ("sequences", "order", "message"),
    [
        ([[BOS, 1]], 1, "order must be at least 2"),
        ([], 3, "no texts"),
        ([[BOS, 1], []], 3, "no token"),
        ([[BOS, VOCAB]], 3, "token 12 is outside"),
        ([[BOS, 1], [1, BOS]], 3, "begin with the same token"),
        ([[BOS, 1, BOS]], 3, "begin with the same token"),
    ],
)
def test_what_cannot_be_counted_is_refused(sequences, order, message):
    with pytest.raises(EvaluateError, match=message):
        NGram(sequences, VOCAB, order)
