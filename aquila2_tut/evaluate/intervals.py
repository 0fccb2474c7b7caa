"""How far a figure can be trusted: 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from aquila2_tut.evaluate.errors import EvaluateError

Z = 1.959963984540054  # 95 % of a normal distribution are within so many standard deviations


class Estimate(NamedTuple):
    """A figure and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def wilson(right: int, total: int) -> Estimate:
    """A share, such as of right answers. Unlike the plain interval, it is of use near 0 and 1 too.

    Args:
        right: how many are.
        total: of how many.

    Raises:
        EvaluateError: of none at all, or more than of all.

    Source: Wilson 1927 (doi 10.1080/01621459.1927.10502953).
    """
    if not 0 <= right <= total or total == 0:
        raise EvaluateError(f"{right} of {total} is no share: give a count of at least 1 and at most as many right")
    share, weight = right / total, Z**2 / total
    middle = (share + weight / 2) / (1 + weight)
    reach = Z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return Estimate(share, max(0.0, middle - reach), min(1.0, middle + reach))


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, *, seed: int = 0, rounds: int = 1000) -> Estimate:
    """A figure over items that might as well have been others of their kind: they are drawn anew, with replacement.

    With a dozen items or fewer the interval comes out too narrow.

    Args:
        statistic: indices (count,) of items, some of them more than once -> the figure.
        count: items there are.
        seed: of the draws.
        rounds: how often they are drawn.

    Raises:
        EvaluateError: there are no items.

    Source: the percentile interval of Efron 1979 (doi 10.1214/aos/1176344552).
    """
    if count < 1:
        raise EvaluateError("there is nothing to measure: give at least one item")
    dice = np.random.default_rng(seed)
    drawn = [statistic(dice.integers(count, size=count)) for _ in range(rounds)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Estimate(float(statistic(np.arange(count))), float(low), float(high))
