"""The commands ``pretrain``, ``finetune`` and ``merge`` of ``aquila2-tut``: recipes by name, or from a file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from ..terminal import add_common
from .checkpoints import checkpoints
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
    _need_accelerate()
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


def _need_accelerate() -> None:
    if not find_spec("accelerate"):
        raise TrainError("transformers' Trainer needs accelerate: pip install 'aquila2-tut[train]'")


def run_finetune(
    argv: Sequence[str],
    text: dict[str, str],
    opener: Callable[..., Any],
    memory: Callable[[], int | None],
    need: Callable[..., Any],
) -> int:
    """The command ``aquila2-tut finetune``.

    Args:
        argv: what follows ``finetune`` on the command line.
        text: the messages in the reader's language.
        opener: `aquila2_tut.AutoLoader`.
        memory: tells how many bytes there are to train in, or None.
        need: tells how many a run needs, see `dry_run`.

    Returns:
        The exit status.

    Raises:
        TrainError, DataError, LoaderError: see `finetune`.
    """
    options = _finetune_parser(text).parse_args(argv)
    _need_accelerate()
    from .finetuning import finetune
    from .plan import dry_run
    from .tuning import Tuning

    changes = dict(_change(pair) for pair in options.set)
    if options.data:
        changes["data"] = options.data
    recipe = load_recipe(Tuning, options.recipe, **changes)
    if options.dry_run:
        print(*dry_run(recipe, opener, need, text["tag"], memory()), sep="\n")
        return 0
    folder = Path(options.out or f"runs/{Path(options.recipe).stem}")
    try:
        target = finetune(recipe, folder, opener, text["tag"])
    except KeyboardInterrupt:
        found = checkpoints(folder)
        words = text["interrupted"].format(checkpoint=found[-1]) if found else text["interrupted_early"]
        print(f"\n{words}", file=sys.stderr)
        raise
    if os.environ.get("RANK", "0") == "0":
        print(target)
    return 0


def _change(pair: str) -> tuple[str, Any]:
    """`key=value`, the value as in a recipe."""
    key, equals, value = pair.partition("=")
    if not equals or not key.strip():
        raise TrainError(f"--set {pair}: key=value is needed, such as --set learning_rate=1e-4")
    try:
        return key.strip(), "" if not value else yaml.safe_load(value)
    except yaml.YAMLError:
        raise TrainError(
            f"--set {pair}: {value!r} is no value of a recipe; put text with odd signs in quotes"
        ) from None


def _finetune_parser(text: dict[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aquila2-tut finetune", description=text["finetune"], add_help=False)
    parser.add_argument("--recipe", required=True, metavar="R", help=text["recipe"])
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=text["set"])
    parser.add_argument("--data", metavar="FILE", help=text["tuning_data"])
    parser.add_argument("--out", metavar="DIR", help=text["out"])
    parser.add_argument("--dry-run", action="store_true", help=text["dry_run"])
    add_common(parser, text)
    return parser


def parse_merge(argv: Sequence[str], text: dict[str, str]) -> argparse.Namespace:
    """Reads the command line of ``aquila2-tut merge``."""
    parser = argparse.ArgumentParser(prog="aquila2-tut merge", description=text["merge"], add_help=False)
    parser.add_argument("base", metavar="BASE", help=text["merge_base"])
    parser.add_argument("adapter", metavar="ADAPTER", help=text["merge_adapter"])
    parser.add_argument("--out", required=True, metavar="DIR", help=text["merge_out"])
    parser.add_argument("--model-dir", metavar="DIR", help=text["model_dir"])
    add_common(parser, text)
    return parser.parse_args(argv)
