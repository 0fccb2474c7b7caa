"""The command `aquila2-tut data tasks`: print instances of a generated task."""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

from aquila2_tut.data.corpora import LANGUAGES, DataError
from aquila2_tut.data.tasks import SPLITS, TASKS, Instance, generate
from aquila2_tut.terminal import add_common


def run_tasks(argv: list[str], text: dict[str, str]) -> int:
    """Print instances.

    Args:
        argv: what follows ``data tasks`` on the command line.
        text: the messages in the reader's language.

    Returns:
        The exit status 0.

    Raises:
        DataError: a file that cannot be read, or a task without what it needs.
    """
    asked = _parser(text).parse_args(argv)
    material = None if asked.file is None else read_blocks(asked.file)
    for instance in islice(generate(asked.task, asked.language, asked.split, asked.seed, material), max(0, asked.n)):
        sample = instance.conversation(asked.cot)
        print(json.dumps(sample, ensure_ascii=False) if asked.jsonl else _told(instance, sample))
    return 0


def read_blocks(path: Path) -> list[list[str]]:
    """Blocks of lines with empty lines between: a poem, or an English sentence and its translation.

    Raises:
        DataError: a file that cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line.strip())
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def _told(instance: Instance, sample: dict[str, list[dict[str, str]]]) -> str:
    lines = [f"[{instance.id}]", *(turn["value"] for turn in sample["conversations"])]
    # A file's sentence must not steer the terminal.
    return "\n".join("".join(mark for mark in line if mark.isprintable()) for line in lines) + "\n"


def _parser(text: dict[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aquila2-tut data tasks", description=text["tasks"], epilog=", ".join(TASKS), add_help=False
    )
    parser.add_argument("--task", required=True, choices=TASKS, metavar="TASK", help=text["task"])
    parser.add_argument("--language", default="en", choices=LANGUAGES, help=text["task_language"])
    parser.add_argument("--split", default="train", choices=SPLITS, help=text["task_split"])
    parser.add_argument("-n", type=int, default=5, help=text["task_n"])
    parser.add_argument("--seed", type=int, default=0, help=text["task_seed"])
    parser.add_argument("--cot", action="store_true", help=text["task_cot"])
    parser.add_argument("--jsonl", action="store_true", help=text["task_jsonl"])
    parser.add_argument("--file", type=Path, metavar="FILE", help=text["task_file"])
    add_common(parser, text)
    return parser
