"""Memory and what it is spent on: derived (`formula` for a step, `inference` for an answer), rehearsed (`rehearse`),
measured (`measure`); the cards and what links them (`hardware`), and several of them together (`sharding`)."""

from .errors import RehearsalError
from .formula import formula
from .hardware import GPU, GPUS, LINKS, Link
from .inference import Answering, cache_bytes_per_token, context_that_fits
from .measure import measure
from .rehearse import rehearse
from .sharding import SPLIT, STRATEGIES, Held, collectives, held_bytes, sent_bytes

__all__ = [
    "GPU",
    "GPUS",
    "LINKS",
    "SPLIT",
    "STRATEGIES",
    "Answering",
    "Held",
    "Link",
    "RehearsalError",
    "cache_bytes_per_token",
    "collectives",
    "context_that_fits",
    "formula",
    "held_bytes",
    "measure",
    "rehearse",
    "sent_bytes",
]
