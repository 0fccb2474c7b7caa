"""Measuring: how well a model predicts text, and how often it is right, each figure with its interval."""

from aquila2_tut.evaluate.bits import Bits, bits_per_byte, difference, interval
from aquila2_tut.evaluate.errors import EvaluateError
from aquila2_tut.evaluate.generated import (
    NearestPair,
    accuracy,
    ask,
    chrf,
    guesses,
    held_out,
    majority,
    translations,
)
from aquila2_tut.evaluate.intervals import Estimate, bootstrap, wilson
from aquila2_tut.evaluate.ngram import NGram, byte_sequence

__all__ = [
    "Bits",
    "Estimate",
    "EvaluateError",
    "NGram",
    "NearestPair",
    "accuracy",
    "ask",
    "bits_per_byte",
    "bootstrap",
    "byte_sequence",
    "chrf",
    "difference",
    "guesses",
    "held_out",
    "interval",
    "majority",
    "translations",
    "wilson",
]
