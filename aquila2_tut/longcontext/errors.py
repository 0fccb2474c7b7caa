"""What goes wrong with long texts."""

from __future__ import annotations


class LongContextError(ValueError):
    """A text, a task or a measurement that cannot be made sense of."""
