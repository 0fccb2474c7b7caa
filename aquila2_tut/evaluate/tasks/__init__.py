"""Benchmarks in small: items that the project wrote itself, in the formats of the sets that everybody quotes.

A dozen of each, so that every format can be read, scored and tested without a network; they say nothing about a model,
as the interval around a share of twelve shows. The real sets are read from a folder that holds them in the same format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from aquila2_tut.evaluate.errors import EvaluateError
from aquila2_tut.evaluate.scorers import AGGREGATIONS, SCORERS, boxed
from aquila2_tut.evaluate.shipped import GENERATED, SHIPPED, shipped_items

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


def _is_boxed(value: Any) -> bool:
    return _is_text(value) and bool(boxed(value))


def _may_be_missing(value: Any) -> bool:
    return value is None or isinstance(value, str)


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
    "ceval": Format({**dict.fromkeys(["subject", "question", *"ABCD"], _TEXT), "answer": _one_of(*"ABCD")}, "C-Eval"),
    "cmmlu": Format({**dict.fromkeys(["subject", "Question", *"ABCD"], _TEXT), "Answer": _one_of(*"ABCD")}, "CMMLU"),
    "gaokao": Format(
        {
            "passage": (_may_be_missing, "a text, or null"),
            "question": _TEXT,
            "options": (_are_four, "a list of four texts, (A) to (D)"),
            "label": _one_of(*"ABCD"),
        },
        "AGIEval",
    ),
    "math": Format(
        {"problem": _TEXT, "solution": (_is_boxed, "a worked solution with its answer in \\boxed{}")}, "MATH"
    ),
    "wmt22": Format({"en": _TEXT, "zh": _TEXT}, "a pair of sentences"),
    "humaneval": Format(
        dict.fromkeys(["task_id", "prompt", "entry_point", "canonical_solution", "test"], _TEXT), "HumanEval"
    ),
    **{kind: Format({"question": _TEXT, "answer": _TEXT}, "a story with its question") for kind in GENERATED},
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
ALL_SETS = (*SETS, *SHIPPED)


def load_items(name: str, folder: str | Path | None = None) -> list[dict[str, Any]]:
    """The items of a set, each checked.

    Args:
        name: one of `ALL_SETS`; or of a file NAME.jsonl in the folder, whose name begins with a key of `FORMATS`.
        folder: where it is; by default, where the project's own are.

    Raises:
        EvaluateError: no such set, or an item that is not as it should be: file, line and field are named.
        AssetError: HumanEval has not been fetched.
    """
    if folder is None and (items := shipped_items(name)) is not None:
        return items
    file = _file(name, folder)
    wanted = FORMATS[name.split("-")[0]]
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
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


def lm_eval_task(
    name: str, folder: str | Path | None = None, items: Sequence[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """A set as a task of EleutherAI's lm-eval: what is in its yaml, with its items.

    Args:
        name: one of `ALL_SETS`, or the name of a file in the folder of which a set has the format and the language.
        folder: see `load_items`; the items are checked.
        items: take these in place of what the name stands for.

    Returns:
        A configuration that `lm_eval.simple_evaluate(tasks=[...])` takes.

    Raises:
        EvaluateError: see `load_items`; or no set of that format in that language, the last word of the name.
    """
    items = load_items(name, folder) if items is None else items
    words = name.split("-")
    pattern = _HERE / f"{words[0]}-{words[-1]}.yaml"
    if not pattern.is_file():
        raise EvaluateError(
            f"{name}: how it is asked is known for {', '.join(ALL_SETS)}: name the file after one of them"
        )
    task = yaml.safe_load(pattern.read_text(encoding="utf-8"))
    task |= {"task": f"aquila2-{name}", "custom_dataset": lambda **_: _in_memory(items)}
    if "process_results" in task:
        task["process_results"] = SCORERS[task["process_results"]]
    for metric in task["metric_list"]:
        metric["aggregation"] = AGGREGATIONS.get(metric["aggregation"], metric["aggregation"])
    return task


def _in_memory(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items as lm-eval's library wants them; read from a file, they would be copied into a cache of the user's."""
    from datasets import Dataset

    return {"test": Dataset.from_list(list(items))}
