"""The command ``aquila2-tut extend``: a small model's context, extended by every scaling and measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..terminal import add_common


def run_extend(argv: Sequence[str], text: dict[str, str]) -> int:
    """Runs the command.

    Args:
        argv: what follows ``extend`` on the command line.
        text: the messages in the reader's language.

    Returns:
        The exit status.

    Raises:
        TrainError, LongContextError, AssetError: see `aquila2_tut.longcontext.extend.extend`.
    """
    options = _parser(text).parse_args(argv)
    from ..train.recipe import load_recipe
    from .extend import RECIPE, Extension, bits_per_byte, extend, found_share

    def told(number: int, total: int, row: dict[str, Any]) -> None:
        length = max(tokens for _, tokens, *_ in row["passkey"])
        measured = {"bits": bits_per_byte(row), "length": length, "found": found_share(row, length)}
        words = {name: row[name] for name in ("factor", "method", "seed")} | {"stage": text[f"extend_{row['stage']}"]}
        print(text["extend_cell"].format(count=number, total=total, **words, **measured), file=sys.stderr, flush=True)

    chosen = {name: getattr(options, name) for name in ("methods", "factors", "seeds") if getattr(options, name)}
    print(extend(load_recipe(Extension, options.recipe or RECIPE, **chosen), options.out, told))
    return 0


def _parser(text: dict[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aquila2-tut extend", description=text["extend"], add_help=False)
    parser.add_argument("--recipe", type=Path, metavar="FILE", help=text["extend_recipe"])
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=text["extend_methods"])
    parser.add_argument("--factors", nargs="+", type=int, metavar="N", help=text["extend_factors"])
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help=text["extend_seeds"])
    parser.add_argument("--out", type=Path, default=Path("runs/extend"), metavar="DIR", help=text["out"])
    add_common(parser, text)
    return parser
