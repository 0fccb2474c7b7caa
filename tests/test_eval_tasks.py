"""Our own items: in the published formats, sound, and read by lm-eval; a broken file is told by line and field."""

import json
import re
from collections import Counter

import pytest

from aquila2_tut.evaluate import EvaluateError
from aquila2_tut.evaluate.shipped import SHIPPED
from aquila2_tut.evaluate.tasks import ALL_SETS, FORMATS, SETS, lm_eval_task, load_items

MATHS = re.compile(r"([\d.]+(?: [*/+-] [\d.]+)+|[\d.]+ [*/+-] \([\d.]+ [+-] [\d.]+\)) = ([\d.]+)")


@pytest.mark.parametrize("name", SETS)
def test_a_set_has_a_dozen_items_and_no_position_pays(name):
    items = load_items(name)
    assert len(items) == 12 and len({json.dumps(item) for item in items}) == 12
    key = next((key for key in ("label", "answer", "Answer") if key in items[0]), None)
    if key and not name.startswith("gsm8k"):
        positions = Counter(item[key] for item in items)
        assert len(set(positions.values())) == 1, positions


def test_every_format_is_there_in_each_language_that_it_has():
    assert {name.split("-")[0] for name in ALL_SETS} == set(FORMATS)
    english = {name.split("-")[0] for name in ALL_SETS if name.endswith("-en")}
    chinese = {name.split("-")[0] for name in ALL_SETS if name.endswith("-zh")}
    assert english == set(FORMATS) - {"ceval", "cmmlu", "gaokao", "wmt22"}
    assert chinese == set(FORMATS) - {"mmlu", "math", "humaneval"}


def test_items_that_packages_bring_have_the_formats():
    for name in SHIPPED:
        for item in load_items(name):
            for field, (fits, what) in FORMATS[name.split("-")[0]].fields.items():
                assert fits(item[field]), (name, item, what)
    assert len(load_items("humaneval-en")) == 164 and len(load_items("gsm8k-shipped-en")) == 8
    subjects = Counter(item["subject"] for item in load_items("mmlu-shipped-en"))
    assert len(subjects) == 57 and set(subjects.values()) <= {3, 4, 5}


def test_chinese_sets_are_chinese_and_simplified():
    for name in SETS:
        text = " ".join(str(value) for item in load_items(name) for key, value in item.items() if key != "en")
        if name.endswith("-zh"):
            assert len(re.findall(r"[一-鿿]", text)) > 150
            text.encode("gb2312")
        else:
            assert not re.search(r"[一-鿿]", text)


@pytest.mark.parametrize("name", ["gsm8k-en", "gsm8k-zh"])
def test_every_sum_in_a_worked_solution_comes_out_and_gives_the_answer(name):
    for item in load_items(name):
        worked, _, answer = item["answer"].partition("\n#### ")
        sums = MATHS.findall(worked)
        assert sums, item
        for left, right in sums:
            assert re.fullmatch(r"[\d.*/+() -]+", left)
            assert eval(left) == pytest.approx(float(right)), (left, right)
        assert float(sums[-1][1]) == float(answer) or answer in re.findall(r"\d+", worked)[-3:]


def test_pairs_that_turn_on_one_word_have_the_two_answers():
    items = load_items("winogrande-en")
    chosen = {item["sentence"]: item[f"option{item['answer']}"] for item in items}
    stem = "The suitcase did not fit into the locker because the _ was too"
    assert chosen[f"{stem} small."] == "locker" and chosen[f"{stem} large."] == "suitcase"


# --- what is wrong is told


GOOD = {"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5"}


@pytest.mark.parametrize(
    "name, line, message",
    [
        ("gsm8k-x", "{", "line 2: no JSON"),
        ("gsm8k-x", "[1]", "line 2: a list"),
        ("gsm8k-x", '{"question": "2 + 3?"}', "line 2: the field 'answer' is missing: give a worked solution"),
        ("gsm8k-x", '{"question": "2 + 3?", "answer": "5"}', "line 2: the field 'answer' is '5'"),
        ("gsm8k-x", '{"question": " ", "answer": "2 + 3 = 5\\n#### 5"}', "line 2: the field 'question'"),
        ("mmlu-x", '{"subject": "s", "question": "q", "choices": ["a"], "answer": 0}', "line 2: the field 'choices'"),
        (
            "mmlu-x",
            '{"subject": "s", "question": "q", "choices": ["a", "b", "c", "d"], "answer": true}',
            "line 2: the field 'answer' is 'True': give one of",
        ),
        (
            "winogrande-x",
            '{"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}',
            "'sentence'.*one gap",
        ),
        (
            "causal-x",
            '{"premise": "p", "hypothesis1": "a", "hypothesis2": "b", "ask_for": "why", "label": 0}',
            "ask_for",
        ),
    ],
)
def test_a_malformed_file_names_file_line_and_field(tmp_path, name, line, message):
    good = load_items(next(own for own in SETS if own.startswith(name.split("-")[0])))[0]
    (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(good)}\n{line}\n", encoding="utf-8")
    with pytest.raises(EvaluateError, match=f"{name}.jsonl.*{message}"):
        load_items(name, tmp_path)
    with pytest.raises(EvaluateError, match=message):
        lm_eval_task(name, tmp_path)


def test_files_without_items_or_in_another_encoding(tmp_path):
    (tmp_path / "gsm8k-a.jsonl").write_text("\n\n")
    with pytest.raises(EvaluateError, match="no item in it"):
        load_items("gsm8k-a", tmp_path)
    (tmp_path / "gsm8k-b.jsonl").write_bytes('{"question": "几个？"}'.encode("gb18030"))
    with pytest.raises(EvaluateError, match="not UTF-8"):
        load_items("gsm8k-b", tmp_path)


def test_a_set_that_is_not_here_says_how_to_get_it(tmp_path):
    with pytest.raises(EvaluateError, match=r"mmlu-full is not here.*MMLU.*mmlu-full\.jsonl in a folder"):
        load_items("mmlu-full")
    with pytest.raises(EvaluateError, match=r"humaneval-full is not here.*HumanEval"):
        load_items("humaneval-full")
    with pytest.raises(EvaluateError, match="no format 'arc'; known: mmlu"):
        load_items("arc", tmp_path)
    (tmp_path / "gsm8k-full.jsonl").write_text(json.dumps(GOOD))
    assert load_items("gsm8k-full", tmp_path) == [GOOD]
    with pytest.raises(EvaluateError, match="name the file after one of them"):
        lm_eval_task("gsm8k-full", tmp_path)


# --- lm-eval


@pytest.mark.slow
def test_lm_eval_reads_every_set_and_knows_the_right_answer(tmp_path, monkeypatch):
    """A model that gives the right answer's text all its belief is right everywhere; one that shuns it, nowhere."""
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.api.model import LM

    texts = {json.dumps(item, ensure_ascii=False): item for name in SETS for item in load_items(name)}
    assert len(texts) == 12 * len(SETS)

    class Knowing(LM):
        def __init__(self, sign):
            super().__init__()
            self.sign = sign

        def loglikelihood(self, requests):
            return [(self.sign * float(right(r.doc, *r.args)), False) for r in requests]

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

        def generate_until(self, requests):
            return [written(r.doc) if self.sign > 0 else "#### 1000000" for r in requests]

    for sign in (1, -1):
        found = lm_eval.simple_evaluate(
            model=Knowing(sign), tasks=[lm_eval_task(name) for name in SETS], bootstrap_iters=0, log_samples=False
        )
        scores = {name: found["results"][f"aquila2-{name}"] for name in SETS}
        for name, score in scores.items():
            kinds = ("acc,none", "exact_match,strict", "exact_match,none", "chrf,none")
            value = next(score[kind] for kind in kinds if kind in score)
            best = 100 if name.startswith("wmt22") else 1
            assert value == pytest.approx(best if sign > 0 else 0, abs=1e-9), (name, score)


def written(doc):
    return doc.get("solution") or doc.get("zh") or doc["answer"]


def right(doc, context, continuation):
    """Whether a request asks for the right answer, told from the item alone and not from a template."""
    if "sentence" in doc:
        before, after = doc["sentence"].split("_")
        return context + continuation == before + doc[f"option{doc['answer']}"] + after
    if "obs1" in doc:
        return doc[f"hyp{doc['label']}"] in continuation
    if "ask_for" in doc:
        return doc[f"hypothesis{doc['label'] + 1}"][1:] in continuation
    if "premise" in doc:
        return continuation.strip() in (("yes", "能") if doc["label"] == 0 else ("no", "不能"))
    answer = next(doc[key] for key in ("answer", "Answer", "label") if key in doc)
    answer = answer if isinstance(answer, str) else "ABCD"[answer]
    if "options" in doc:
        return continuation.strip() == answer and doc["options"]["ABCD".index(answer)] in context
    shown = doc["choices"]["ABCD".index(answer)] if "choices" in doc else doc[answer]
    return continuation.strip() == answer and f"{answer}. {shown}" in context
