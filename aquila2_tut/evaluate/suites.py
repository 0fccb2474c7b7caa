"""The columns of the README's tables as tasks, with its numbers of examples; where their items come from.

The real items are read from a folder: a file for each set, a JSON object a line, named after what it holds, such as
mmlu-en.jsonl, and mmlu-dev-en.jsonl for the examples in the prompt. Several files, such as gaokao-physics-zh.jsonl and
gaokao-history-zh.jsonl, make one column together. Nothing small is ever taken for the real thing: `mmlu` is the column
and needs its file, `mmlu-en` is a set and without a folder our dozen items.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from aquila2_tut.chat.templates import Template
from aquila2_tut.evaluate.errors import EvaluateError
from aquila2_tut.evaluate.sandbox import refusal
from aquila2_tut.evaluate.tasks import ALL_SETS, FORMATS, lm_eval_task, load_items
from aquila2_tut.longcontext.longbench import LONG_TASKS, Item, LongTask, cut_middle, read_items


class Column(NamedTuple):
    """One column of a table.

    Attributes:
        title: what the README calls it, as in `published.py`.
        kind: the first word of its files' names, a key of `FORMATS`.
        language: the last word.
        shots: examples in the prompt, as the README says; 0 where it says nothing.
        by_subject: the mean is of subjects, not of items.
        source: where its items are had.
    """

    title: str
    kind: str
    language: str
    shots: int
    by_subject: bool
    source: str


COLUMNS = {
    "ceval": Column("C-Eval", "ceval", "zh", 5, True, "ceval/ceval-exam, val and dev, with a field for the subject"),
    "mmlu": Column("MMLU", "mmlu", "en", 5, False, "cais/mmlu, configuration all, test and dev"),
    "cmmlu": Column("CMMLU", "cmmlu", "zh", 5, True, "haonan-li/cmmlu, test and dev, with a field for the subject"),
    "gsm8k": Column("GSM8K", "gsm8k", "en", 8, False, "openai/gsm8k, main, test"),
    "gaokao": Column("GaoKao", "gaokao", "zh", 0, True, "AGIEval, data/v1_1/gaokao-*.jsonl, questions with one answer"),
    "math": Column("MATH", "math", "en", 4, False, "EleutherAI/hendrycks_math, all subjects, test"),
    "humaneval": Column("HumanEval", "humaneval", "en", 0, False, "aquila2-tut assets fetch human-eval"),
    "wmt22": Column("WMT22 en-zh", "wmt22", "zh", 0, False, "sacrebleu -t wmt22 -l en-zh --echo src ref, as en and zh"),
    "winogrande": Column("WinoGrande", "winogrande", "en", 0, False, "allenai/winogrande, winogrande_xl, validation"),
    "babi15": Column("bAbI 15", "babi15", "en", 0, False, "bAbI, qa15, test: story and question as question"),
    "babi16": Column("bAbI 16", "babi16", "en", 0, False, "bAbI, qa16, test: story and question as question"),
    "clutrr": Column("CLUTRR", "kinship", "en", 0, False, "CLUTRR, test: story and question as question"),
    "entailmentbank": Column(
        "EntailmentBank", "entailment", "en", 0, False, "EntailmentBank, as premise and hypothesis"
    ),
    "anli": Column("αNLI", "abduction", "en", 0, False, "αNLI, dev.jsonl with its labels"),
    "ecare": Column("e-CARE", "causal", "en", 0, False, "e-CARE, dev.jsonl"),
}
LONG_TEXT = ("vcsum", "lsht", "hotpotqa", "2wikimqa")
GROUPS = {
    "base": ("ceval", "mmlu", "cmmlu", "gsm8k", "gaokao", "math", "humaneval", "wmt22", "winogrande"),
    "reasoning": ("babi15", "babi16", "clutrr", "entailmentbank", "anli", "ecare"),
    "long-text": LONG_TEXT,
    "small": tuple(name for name in ALL_SETS if name != "humaneval-en"),
}
METRICS = {"gsm8k": "exact_match", "math": "exact_match", "humaneval": "pass@1", "wmt22": "bleu"}


@dataclass(frozen=True)
class Suite:
    """One line of the result: tasks of lm-eval that belong together.

    Args:
        name: as it was asked for.
        title: of the README's column, or the name.
        metric: what counts.
        shots: examples in the prompt.
        by_subject: the mean is of the tasks, not of their items.
        chat: whether a chat template may be put around its prompts.
        tasks: configurations that lm-eval takes.
    """

    name: str
    title: str
    metric: str
    shots: int
    by_subject: bool
    chat: bool
    tasks: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Setting:
    """What the tasks are made with.

    Args:
        tokenizer: counts the tokens of long texts.
        context: tokens that the model's context holds.
        folder: where the real items are; None for none.
        shots: instead of each column's own.
        execute: generated programs may be run.
        template: that is going to be put around long texts.
    """

    tokenizer: PreTrainedTokenizerBase
    context: int
    folder: Path | None = None
    shots: int | None = None
    execute: bool = False
    template: Template | None = None


def suites(names: Sequence[str], setting: Setting) -> list[Suite]:
    """The tasks of groups, columns and sets.

    Args:
        names: keys of `GROUPS`, `COLUMNS` or `LONG_TASKS`, members of `ALL_SETS`, files in the folder.
        setting: what they are made with.

    Raises:
        EvaluateError: an unknown name, a task whose items are not here, a malformed file, or programs that may not run.
        LongContextError: a malformed file of LongBench's.
        AssetError: HumanEval has not been fetched.
    """
    single = dict.fromkeys(one for name in names for one in GROUPS.get(name, (name,)))
    if not single:
        raise EvaluateError(f"there are no tasks: give some of {_known()}")
    return [_suite(name, setting) for name in single]


def _known() -> str:
    return ", ".join([*GROUPS, *COLUMNS, *LONG_TASKS, *ALL_SETS])


def _suite(name: str, setting: Setting) -> Suite:
    if name in COLUMNS:
        return _column(name, setting)
    if name in LONG_TASKS:
        return _long_text(LONG_TASKS[name], setting)
    kind, language = name.split("-")[0], name.split("-")[-1]
    file = setting.folder / f"{name}.jsonl" if setting.folder and re.fullmatch(r"[\w-]+", name) else None
    folder = setting.folder if file and file.is_file() else None
    if kind not in FORMATS or (folder is None and name not in ALL_SETS):
        raise EvaluateError(f"there is no task {name!r} (nor a file {file or name + '.jsonl'}); known: {_known()}")
    _check_programs(kind, setting)
    shots = _shots(next(column for column in COLUMNS.values() if column.kind == kind), setting)
    items = load_items(name, folder)
    if setting.shots is None and "shipped" in name:
        shots = min(shots, len(items) - 1)  # they are the examples themselves
    task = _with_examples(name, items, kind, language, shots, None, setting)
    return Suite(name, name, METRICS.get(kind, "acc"), shots, False, True, (task,))


def _shots(column: Column, setting: Setting) -> int:
    return column.shots if setting.shots is None else setting.shots


def _check_programs(kind: str, setting: Setting) -> None:
    if kind != "humaneval":
        return
    if not setting.execute:
        raise EvaluateError(
            "humaneval runs programs that the model writes, in a sandbox, if you allow it: --allow-code-execution"
        )
    if reason := refusal():
        raise EvaluateError(f"humaneval: {reason}")


def _column(name: str, setting: Setting) -> Suite:
    column = COLUMNS[name]
    _check_programs(column.kind, setting)
    found = list(_files(column, setting.folder))
    if not found and name == "humaneval":
        found = [("humaneval-en", None)]
    if not found:
        wanted = f"{column.kind}-{column.language}.jsonl"
        raise EvaluateError(
            f"{name}: put {wanted} ({column.source}) into a folder and give it with --data-folder"
            f"{f' (there is none in {setting.folder})' if setting.folder else ''}; our own small items: "
            f"{column.kind}-{column.language}"
        )
    shots = _shots(column, setting)
    tasks = tuple(task for file, folder in found for task in _by_subject(file, folder, column, shots, setting))
    return Suite(name, column.title, METRICS.get(column.kind, "acc"), shots, column.by_subject, True, tasks)


def _files(column: Column, folder: Path | None) -> Iterator[tuple[str, Path]]:
    """The names of a column's sets in a folder."""
    if folder is None:
        return
    if not folder.is_dir():
        raise EvaluateError(f"{folder}: no such folder: give one that holds the files of the tasks")
    for file in sorted(folder.glob(f"{column.kind}-*.jsonl")):
        words = file.stem.split("-")
        if words[-1] == column.language and "dev" not in words:
            yield file.stem, folder


def _by_subject(
    name: str, folder: Path | None, column: Column, shots: int, setting: Setting
) -> Iterator[dict[str, Any]]:
    """A task for each subject, as each has examples of its own."""
    items = load_items(name, folder)
    for subject in dict.fromkeys(item.get("subject") for item in items):
        chosen = [item for item in items if item.get("subject") == subject]
        task = _with_examples(name, chosen, column.kind, column.language, shots, subject, setting)
        if subject is not None:
            task["task"] += "-" + re.sub(r"\W+", "-", subject)
        yield task


def _with_examples(
    name: str,
    items: Sequence[dict[str, Any]],
    kind: str,
    language: str,
    shots: int,
    subject: str | None,
    setting: Setting,
) -> dict[str, Any]:
    """Items with examples before each of them, always the same ones, so that the model reads them once."""
    if shots < 0:
        raise EvaluateError(f"{shots} examples: give 0 or more")
    dev = f"{kind}-dev-{language}"
    found = _examples(kind, language, shots, subject, setting.folder) if shots else []
    if len(found) < shots + any(item in found for item in items):  # an item is never its own example
        raise EvaluateError(f"{name}: there are {len(found)} examples, too few for {shots}: put more into {dev}.jsonl")
    task = lm_eval_task(name, items=items)
    return task | {"num_fewshot": shots, "fewshot_config": {"sampler": "first_n", "samples": found}}


def _examples(kind: str, language: str, shots: int, subject: str | None, folder: Path | None) -> list[dict[str, Any]]:
    """Examples for a prompt, one more than needed if there are so many.

    They come from KIND-dev-LANGUAGE.jsonl in the folder; or from what packages ship; or from our own small set.
    """
    dev = f"{kind}-dev-{language}"
    sources = [(dev, folder)] if folder and (folder / f"{dev}.jsonl").is_file() else []
    sources += [(name, None) for name in (f"{kind}-shipped-{language}", f"{kind}-{language}") if name in ALL_SETS]
    items = load_items(*sources[0])
    same = [item for item in items if item.get("subject") == subject]
    return (same if len(same) >= shots else items)[: shots + 1]


# --- long texts ------------------------------------------------------------------------------------------------------


def _long_text(task: LongTask, setting: Setting) -> Suite:
    folder = setting.folder
    if folder is None or not (folder / f"{task.name}.jsonl").is_file():
        raise EvaluateError(
            f"{task.name}: put {task.name}.jsonl, out of LongBench's data.zip, into a folder, then --data-folder FOLDER"
        )
    items = read_items(task.name, folder)
    template = setting.template if task.chat else None
    around = len(template.encode([("human", "."), ("gpt", None)], setting.tokenizer)) if template else 0
    # The text's ends may be split otherwise within the template: a few tokens more.
    room = setting.context - task.tokens - around - 8
    if room < 2:
        raise EvaluateError(f"{task.name}: {room} tokens are left for the prompt: a longer context is needed")
    config = _long_config(task, items, [cut_middle(setting.tokenizer, task.ask(item), room).text for item in items])
    return Suite(task.name, task.name, "score", 0, False, task.chat, (config,))


def _long_config(task: LongTask, items: Sequence[Item], prompts: Sequence[str]) -> dict[str, Any]:
    def data(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list([{"place": i, "prompt": prompt} for i, prompt in enumerate(prompts)])}

    def score(item: dict[str, Any], outputs: Sequence[str]) -> dict[str, float]:
        return {"score": task.score(outputs[0], items[item["place"]])}

    return {
        "task": f"aquila2-{task.name}",
        "dataset_path": "json",
        "custom_dataset": data,
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "",
        "process_results": score,
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": task.tokens},
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "metadata": {"version": 1},
    }
