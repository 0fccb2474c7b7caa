"""The terminal: what may be printed to it, and the two options that every command has."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

LANGUAGES = ("en", "zh")
# What a terminal obeys (C0 except newline and tab, DEL, C1), and the marks that turn the direction of writing around.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(piece: str) -> str:
    """Text without the characters that would steer the terminal: a model's answer must not move its cursor."""
    return UNSAFE.sub("", piece)


def add_common(parser: argparse.ArgumentParser, text: Mapping[str, str]) -> None:
    """Give a parser, made without help of its own, `--help` and `--lang` in the reader's language.

    Args:
        parser: of a command.
        text: the messages in the reader's language, see `aquila2_tut.cli.TEXTS`; they were chosen by `--lang` already.
    """
    parser.add_argument("-h", "--help", action="help", help=text["show_help"])
    parser.add_argument("--lang", choices=LANGUAGES, help=text["lang"])
