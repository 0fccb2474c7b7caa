"""The terminal: what may be printed to it, and the two options that every command has."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from datetime import timedelta

LANGUAGES = ("en", "zh")
# What a terminal obeys (C0 except newline and tab, DEL, C1), and the marks that turn the direction of writing around.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(piece: str) -> str:
    """Text without the characters that would steer the terminal: a model's answer must not move its cursor."""
    return UNSAFE.sub("", piece)


def first_to_say(line: str) -> bool:
    """Whether no other process of a run has said the same, so that an error which all of them find is read once.

    Args:
        line: what this process is about to print.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun did not start this process
        return True
    from torch.distributed import TCPStore

    address, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
        return store.add(f"said: {line}", 1) == 1
    except (RuntimeError, ValueError):  # nobody to ask: better twice than never
        return True


def add_common(parser: argparse.ArgumentParser, text: Mapping[str, str]) -> None:
    """Give a parser, made without help of its own, `--help` and `--lang` in the reader's language.

    Args:
        parser: of a command.
        text: the messages in the reader's language, see `aquila2_tut.cli.TEXTS`; they were chosen by `--lang` already.
    """
    parser.add_argument("-h", "--help", action="help", help=text["show_help"])
    parser.add_argument("--lang", choices=LANGUAGES, help=text["lang"])
