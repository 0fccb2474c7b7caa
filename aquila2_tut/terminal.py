"""What may be printed to a terminal: other people's text, without what would steer it."""

from __future__ import annotations

import re

# What a terminal obeys (C0 except newline and tab, DEL, C1), and the marks that turn the direction of writing around.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(piece: str) -> str:
    """Text without the characters that would steer the terminal: a model's answer must not move its cursor."""
    return UNSAFE.sub("", piece)
