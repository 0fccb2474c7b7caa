"""What goes wrong in a measurement."""

from __future__ import annotations


class EvaluateError(ValueError):
    """Something that cannot be measured."""
