"""Memory and what it is spent on: derived (`formula`), rehearsed (`rehearse`), measured (`measure`); the cards and what
links them (`hardware`), and several of them together (`sharding`)."""

from .errors import RehearsalError
from .formula import formula
from .hardware import GPU, GPUS, LINKS, Link
from .measure import measure
from .rehearse import rehearse
from .sharding import SPLIT, STRATEGIES, Held, collectives, held_bytes, sent_bytes

__all__ = [
    "GPU",
    "GPUS",
    "LINKS",
    "SPLIT",
    "STRATEGIES",
    "Held",
    "Link",
    "RehearsalError",
    "collectives",
    "formula",
    "held_bytes",
    "measure",
    "rehearse",
    "sent_bytes",
]
