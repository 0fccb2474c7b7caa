"""Memory and what it is spent on: the cards (`hardware`), and several of them together (`sharding`)."""

from .hardware import GPU, GPUS, LINKS, Link
from .sharding import SPLIT, STRATEGIES, Held, collectives, held_bytes, sent_bytes

__all__ = ["GPU", "GPUS", "LINKS", "SPLIT", "STRATEGIES", "Held", "Link", "collectives", "held_bytes", "sent_bytes"]
