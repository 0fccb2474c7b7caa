"""Benchmarks in small: items that the project wrote itself, in the formats of the sets that everybody quotes.

A dozen of each, so that every format can be read, scored and tested without a network; they say nothing about a model,
as the interval around a share of twelve shows. The real sets are read from a folder that holds them in the same format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from aquila2_tut.evaluate.errors import EvaluateError

_HERE = Path(__file__).parent


class Format(NamedTuple):
    """What a line of a set has to hold.

    Attributes:
        fields: name -> (whether a value will do, what is wanted, in words).
        like: whose format it is.
    """

    fields: Mapping[str, tuple[Callable[[Any], bool], str]]
    like: str


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _one_of(*values: Any) -> tuple[Callable[[Any], bool], str]:
    """Those values and no others: True is not 1 here."""
    return lambda value: any(value == one and type(value) is type(one) for one in values), f"one of {list(values)}"


def _has_gap(value: Any) -> bool:
    return _is_text(value) and value.count("_") == 1


def _is_worked(value: Any) -> bool:
    head, mark, number = value.rpartition("\n#### ") if isinstance(value, str) else ("", "", "")
    return bool(head and mark) and number.replace(",", "").removeprefix("-").replace(".", "", 1).isdigit()


def _are_four(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_text, value))


_TEXT = (_is_text, "a text that is not empty")
FORMATS = {
    "mmlu": Format(
        {
            "subject": _TEXT,
            "question": _TEXT,
            "choices": (_are_four, "a list of four texts"),
            "answer": _one_of(0, 1, 2, 3),
        },
        "MMLU",
    ),
    "ceval": Format(
        {**dict.fromkeys(["subject", "question", *"ABCD"], _TEXT), "answer": _one_of(*"ABCD")}, "C-Eval and CMMLU"
    ),
    "winogrande": Format(
        {
            "sentence": (_has_gap, "a text with one gap, written _"),
            "option1": _TEXT,
            "option2": _TEXT,
            "answer": _one_of("1", "2"),
        },
        "WinoGrande",
    ),
    "gsm8k": Format({"question": _TEXT, "answer": (_is_worked, "a worked solution, then a line #### NUMBER")}, "GSM8K"),
    "entailment": Format({"premise": _TEXT, "hypothesis": _TEXT, "label": _one_of(0, 1)}, "RTE (0: it follows)"),
    "abduction": Format({**dict.fromkeys(["obs1", "obs2", "hyp1", "hyp2"], _TEXT), "label": _one_of("1", "2")}, "αNLI"),
    "causal": Format(
        {
            **dict.fromkeys(["premise", "hypothesis1", "hypothesis2"], _TEXT),
            "ask_for": _one_of("cause", "effect"),
            "label": _one_of(0, 1),
        },
        "e-CARE",
    ),
}
SETS = tuple(sorted(file.stem for file in _HERE.glob("*.jsonl")))


def load_items(name: str, folder: str | Path | None = None) -> list[dict[str, Any]]:
    """The items of a set, each checked.

    Args:
        name: one of `SETS`; or of a file NAME.jsonl in the folder, whose name begins with a key of `FORMATS`.
        folder: where it is; by default, where the project's own are.

    Raises:
        EvaluateError: no such set, or an item that is not as it should be: file, line and field are named.
    """
    file = _file(name, folder)
    wanted = FORMATS[name.split("-")[0]]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise EvaluateError(f"{file}: not UTF-8 (byte {error.start}): save it as UTF-8") from None
    items = [_item(line, f"{file}, line {number}", wanted) for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise EvaluateError(f"{file}: there is no item in it: give one JSON object a line, like {wanted.like}")
    return items


def _file(name: str, folder: str | Path | None) -> Path:
    """The file of a set, or the word where it is to be had."""
    file = Path(folder or _HERE) / f"{name}.jsonl"
    kind = name.split("-")[0]
    if kind == "humaneval":
        raise EvaluateError(
            "HumanEval is an asset: aquila2-tut assets fetch human-eval, then evaluate.sandbox reads it"
        )
    if kind not in FORMATS:
        raise EvaluateError(f"there is no format {kind!r}; known: {', '.join(FORMATS)}")
    if not file.is_file():
        raise EvaluateError(
            f"{name} is not here: put it, in the format of {FORMATS[kind].like}, into {name}.jsonl in a folder, one "
            f"item a line, and give that folder (looked for {file}). The project's own small sets: {', '.join(SETS)}"
        )
    return file


def _item(line: str, where: str, wanted: Format) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EvaluateError(f"{where}: no JSON ({error}): give one object a line, like {wanted.like}") from None
    if not isinstance(item, dict):
        raise EvaluateError(f"{where}: a {type(item).__name__}: give one object a line, like {wanted.like}")
    for field, (fits, what) in wanted.fields.items():
        if field not in item:
            raise EvaluateError(f"{where}: the field {field!r} is missing: give {what}")
        if not fits(item[field]):
            raise EvaluateError(f"{where}: the field {field!r} is {str(item[field])[:60]!r}: give {what}")
    return item


def lm_eval_task(name: str, folder: str | Path | None = None) -> dict[str, Any]:
    """A set as a task of EleutherAI's lm-eval: what is in its yaml, with the place of the file.

    Args:
        name: one of `SETS`, or the name of a file in the folder of which a set has the format and the language.
        folder: see `load_items`; the items are checked.

    Returns:
        A configuration that `lm_eval.simple_evaluate(tasks=[...])` takes.

    Raises:
        EvaluateError: see `load_items`; or no set of that format in that language, the last word of the name.
    """
    load_items(name, folder)
    words = name.split("-")
    pattern = _HERE / f"{words[0]}-{words[-1]}.yaml"
    if not pattern.is_file():
        raise EvaluateError(f"{name}: how it is asked is known for {', '.join(SETS)}: name the file after one of them")
    task = yaml.safe_load(pattern.read_text(encoding="utf-8"))
    files = {task["test_split"]: str(_file(name, folder).resolve())}
    return {**task, "task": f"aquila2-{name}", "dataset_kwargs": {"data_files": files}}
