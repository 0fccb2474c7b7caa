"""Memory and what it is spent on: the cards (`hardware`)."""

from .hardware import GPU, GPUS

__all__ = ["GPU", "GPUS"]
