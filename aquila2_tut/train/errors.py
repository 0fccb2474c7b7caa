"""What goes wrong in training."""

from __future__ import annotations


class TrainError(ValueError):
    """Something that no training step can be made of."""
