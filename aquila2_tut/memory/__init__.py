"""Memory and what it is spent on: derived (`formula`), rehearsed (`rehearse`), measured (`measure`), and the cards."""

from .hardware import GPU, GPUS

__all__ = ["GPU", "GPUS", "RehearsalError", "formula", "measure", "rehearse"]

from .errors import RehearsalError
from .formula import formula
from .measure import measure
from .rehearse import rehearse
