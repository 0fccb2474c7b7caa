"""The command ``aquila2-tut pretrain``: a recipe by name, or from a file, for pretraining or for teaching to answer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..terminal import add_common
from .errors import TrainError
from .recipe import load_recipe, read_recipe


def run_pretrain(argv: Sequence[str], text: dict[str, str]) -> int:
    """The command ``aquila2-tut pretrain``.

    Args:
        argv: what follows ``pretrain`` on the command line.
        text: the messages in the reader's language.

    Returns:
        The exit status.

    Raises:
        TrainError: see `load_recipe`, `pretrain` and `instruct`.
    """
    options = _parser(text).parse_args(argv)
    if not find_spec("accelerate"):
        raise TrainError("transformers' Trainer needs accelerate: pip install 'aquila2-tut[train]'")
    from .instruct import ChatRecipe, instruct
    from .pretrain import Recipe, pretrain

    changes = {name: getattr(options, name) for name in ("steps", "batch_size", "seed") if getattr(options, name)}
    folder = Path(options.out or f"runs/{Path(options.preset).stem}")
    if "base" in read_recipe(options.preset)[1]:  # it begins with a model that is there
        if options.text:
            raise TrainError(f"--text: {options.preset} teaches to answer, and takes no plain texts")
        print(instruct(load_recipe(ChatRecipe, options.preset, **changes), folder))
        return 0
    if options.text:
        missing = [path for path in options.text if not Path(path).exists()]
        if missing:
            raise TrainError(f"{missing[0]}: there is no such file or folder")
        changes["sources"] = dict.fromkeys(options.text, 1)
    print(pretrain(load_recipe(Recipe, options.preset, **changes), folder))
    return 0


def _parser(text: dict[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aquila2-tut pretrain", description=text["pretrain"], add_help=False)
    parser.add_argument("--preset", default="nano", metavar="NAME", help=text["preset"])
    parser.add_argument("--out", metavar="DIR", help=text["out"])
    parser.add_argument("--text", nargs="+", metavar="PATH", help=text["own_text"])
    parser.add_argument("--steps", type=int, metavar="N", help=text["steps"])
    parser.add_argument("--batch-size", type=int, metavar="N", help=text["batch_size"])
    parser.add_argument("--seed", type=int, metavar="N", help=text["run_seed"])
    add_common(parser, text)
    return parser
