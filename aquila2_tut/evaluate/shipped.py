"""Items that packages bring along: HumanEval, and the worked examples of MMLU and GSM8K in lm-eval's own files."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from aquila2_tut.data import generate
from aquila2_tut.evaluate.errors import EvaluateError
from aquila2_tut.evaluate.sandbox import human_eval

GENERATED = ("babi15", "babi16", "kinship")
GENERATED_ITEMS = 30  # as many as the README's reasoning tasks seem to have
_OPTIONS = re.compile(r"(.+?)\s*" + "".join(rf"\({letter}\)\s*(.+?)\s*" for letter in "ABCD"), re.DOTALL)


def shipped_items(name: str) -> list[dict[str, Any]] | None:
    """The items of a set that is not in a file of ours; None if there is no such set.

    Args:
        name: "humaneval-en", "mmlu-shipped-en", "gsm8k-shipped-en", or a generated task with a language.

    Raises:
        AssetError: HumanEval has not been fetched; the message says how.
        EvaluateError: lm-eval is not installed.
    """
    kind, *_, language = name.split("-")
    if name == "humaneval-en":
        return [problem._asdict() for problem in human_eval()]
    if name in ("mmlu-shipped-en", "gsm8k-shipped-en"):
        return list(_mmlu() if kind == "mmlu" else _gsm8k())
    if kind in GENERATED and name == f"{kind}-{language}" and language in ("en", "zh"):
        made = islice(generate(kind, language, "test"), GENERATED_ITEMS)
        return [{"question": one.question, "answer": one.answer} for one in made]
    return None


SHIPPED = (
    "humaneval-en",
    "mmlu-shipped-en",
    "gsm8k-shipped-en",
    *(f"{kind}-{language}" for kind in GENERATED for language in ("en", "zh")),
)


def _lm_eval_tasks() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise EvaluateError("lm-eval is not installed: pip install 'aquila2-tut[eval]'")
    return Path(spec.origin).parent / "tasks"


def _samples(file: Path) -> list[dict[str, str]]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))["fewshot_config"]["samples"]


@functools.cache
def _mmlu() -> tuple[dict[str, Any], ...]:
    """MMLU's development items, five a subject or nearly so, as the authors of Flan worked them out.

    Source: Hendrycks et al. 2020 (arXiv 2009.03300), in lm-eval's flan_cot_fewshot.
    """
    files = sorted((_lm_eval_tasks() / "mmlu" / "flan_cot_fewshot").glob("mmlu_*.yaml"))
    return tuple(item for file in files for item in _mmlu_items(file))


def _mmlu_items(file: Path) -> Iterator[dict[str, Any]]:
    for sample in _samples(file):
        parts = _OPTIONS.fullmatch(sample["question"])
        letters = re.findall(r"answer is:? \(?([A-D])\)", sample["target"])
        if parts and letters:  # one item has five options
            question, *choices = parts.groups()
            answer = "ABCD".index(letters[-1])
            subject = file.stem.removeprefix("mmlu_").replace("_", " ")
            yield {"subject": subject, "question": question, "choices": choices, "answer": answer}


@functools.cache
def _gsm8k() -> tuple[dict[str, Any], ...]:
    """The eight worked examples that papers put before GSM8K's questions.

    Source: Wei et al. 2022 (arXiv 2201.11903), in lm-eval's gsm8k-cot.
    """
    return tuple(
        {"question": sample["question"], "answer": "{}\n#### {}".format(*_worked(sample["target"]))}
        for sample in _samples(_lm_eval_tasks() / "gsm8k" / "gsm8k-cot.yaml")
    )


def _worked(target: str) -> tuple[str, str]:
    solution, _, answer = target.rpartition("The answer is ")
    return " ".join(solution.split()), answer.strip().rstrip(".").replace("$", "")
