"""How outputs are scored where comparing them with the answer is not enough; each from an item and what was written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aquila2_tut.data import Instance, is_correct
from aquila2_tut.evaluate.errors import EvaluateError
from aquila2_tut.evaluate.sandbox import Problem, check_solution

Item = Mapping[str, Any]
_SAME = {
    "dfrac": "frac",
    "tfrac": "frac",
    "left": "",
    "right": "",
    "!": "",
    ",": "",
    ";": "",
    " ": "",
    "$": "",
    "%": "",
}


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} of a solution holds; None if there is none, or it does not end."""
    start = text.rfind("\\boxed{")
    depth = 0
    for place in range(start + 6, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 7 : place]
    return None


def same_formula(one: str, other: str) -> bool:
    r"""Whether two answers are written alike, but for space, \left and \right, \dfrac for \frac, and dollar signs."""
    return _plain_formula(one) == _plain_formula(other)


def _plain_formula(text: str) -> str:
    text = re.sub(r"\\(dfrac|tfrac|left|right|!|,|;| |\$|%)", lambda found: _written(found[1]), text)
    return re.sub(r"[\s$]|\\text\{[^{}]*\}|\.$", "", text.strip())


def _written(command: str) -> str:
    return f"\\{_SAME[command]}" if _SAME[command] else ""


def score_boxed(item: Item, outputs: Sequence[str]) -> dict[str, float]:
    """MATH: what is in the last box, or after the last "answer is", is what is in the solution's box."""
    wanted, given = boxed(item["solution"]), boxed(outputs[0])
    if given is None:
        given = (re.findall(r"answer is:?\s*(.+?)\.?(?:\n|$)", outputs[0]) or [""])[-1]
    return {"exact_match": float(wanted is not None and same_formula(wanted, given))}


def score_answer(item: Item, outputs: Sequence[str]) -> dict[str, float]:
    """A short answer: the same words, see `aquila2_tut.data.is_correct`."""
    language = "zh" if re.search(r"[一-鿿]", item["question"]) else "en"
    return {
        "acc": float(is_correct(Instance("babi15", language, item["question"], item["answer"], "-", ""), outputs[0]))
    }


def score_program(item: Item, outputs: Sequence[str]) -> dict[str, float]:
    """HumanEval: the program passes its test, in the sandbox."""
    return {"pass@1": float(check_solution(Problem(**item), outputs[0]).passed)}


def score_translation(item: Item, outputs: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The output and the reference, to be scored as a whole."""
    pair = (outputs[0].strip(), item["zh"])
    return {"bleu": pair, "chrf": pair}


def bleu_zh(pairs: Sequence[tuple[str, str]]) -> float:
    """BLEU of Chinese translations, 0 to 100, as sacrebleu counts with its tokenizer for Chinese."""
    return _corpus_score("BLEU", pairs, tokenize="zh")


def chrf(pairs: Sequence[tuple[str, str]]) -> float:
    """chrF of translations, 0 to 100, as sacrebleu counts."""
    return _corpus_score("CHRF", pairs)


def _corpus_score(metric: str, pairs: Sequence[tuple[str, str]], **settings: Any) -> float:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise EvaluateError("translations are scored with sacrebleu: pip install 'aquila2-tut[eval]'") from error
    outputs, references = zip(*pairs, strict=True)
    return getattr(metrics, metric)(**settings).corpus_score(outputs, [references]).score


SCORERS: dict[str, Callable[[Item, Sequence[str]], dict[str, Any]]] = {
    "boxed": score_boxed,
    "answer": score_answer,
    "program": score_program,
    "translation": score_translation,
}
AGGREGATIONS: dict[str, Callable[[Sequence[tuple[str, str]]], float]] = {"bleu_zh": bleu_zh, "chrf": chrf}
