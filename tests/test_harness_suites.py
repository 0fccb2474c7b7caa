"""Columns, groups and sets: where their items come from, what is told when they are not there, and the command."""

import json
import zipfile

import pytest
import torch
from lm_eval.api.model import LM
from tuning_runs import some_base

from aquila2_tut import AutoLoader, cli
from aquila2_tut.chat.templates import template_for_model
from aquila2_tut.evaluate import EvaluateError, wilson
from aquila2_tut.evaluate.harness import HarnessModel
from aquila2_tut.evaluate.published import tables
from aquila2_tut.evaluate.runs import evaluate
from aquila2_tut.evaluate.sandbox import human_eval, refusal
from aquila2_tut.evaluate.scorers import boxed, same_formula
from aquila2_tut.evaluate.suites import COLUMNS, GROUPS, LONG_TEXT, Setting, suites
from aquila2_tut.evaluate.tasks import ALL_SETS, FORMATS, load_items
from aquila2_tut.longcontext import LongContextError

contained = pytest.mark.skipif(refusal() is not None, reason=str(refusal()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return some_base(tmp_path_factory.mktemp("suites") / "tiny", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def tiny(folder):
    loader = AutoLoader("aquila2", model_name=str(folder), device="cpu")
    return loader.get_model(), loader.get_tokenizer()


@pytest.fixture
def setting(tiny):
    return Setting(tiny[1], 1024)


class Told(LM):
    """Answers as a function of the item says; keeps what it was asked."""

    template, progress = None, False

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, []

    def loglikelihood(self, requests):
        self.asked += requests
        return [(float(self.answer(request)), False) for request in requests]

    def generate_until(self, requests):
        self.asked += requests
        return [self.answer(request) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


def write(folder, name, items):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


# --- the README's columns


def test_every_column_of_the_readme_is_there_with_its_shots():
    columns = {column.title: column.shots for column in COLUMNS.values()}
    published = tables()
    for name in ("base-first", "reasoning"):
        tasks = {task: shots for task, shots in published[name].shots.items() if task != "Mean"}
        assert set(tasks) <= set(columns)
        for task, shots in tasks.items():
            assert columns[task] == (shots or 0), task
    long = {task.lower() for task in published["long-final"].shots if not task.startswith("Mean")}
    assert set(LONG_TEXT) == long
    assert {name for group in ("base", "reasoning") for name in GROUPS[group]} == set(COLUMNS)
    assert {column.kind for column in COLUMNS.values()} == set(FORMATS)


@pytest.mark.parametrize("name", [*COLUMNS, *LONG_TEXT])
def test_a_column_that_is_not_here_says_in_one_line_what_supplies_it(name, setting, tmp_path, monkeypatch):
    for folder in (None, tmp_path):
        given = Setting(setting.tokenizer, 1024, folder)
        wanted = "--allow-code-execution" if name == "humaneval" else rf"^{name}: put .*\.jsonl.*--data-folder"
        with pytest.raises(EvaluateError, match=wanted) as told:
            suites([name], given)
        assert "\n" not in str(told.value)


def test_names_that_are_no_tasks_are_told(setting, tmp_path):
    write(tmp_path.parent, "mmlu-out-en", load_items("mmlu-en"))
    for name in ("arc", "mmlu-fr", "../mmlu-out-en", f"../{tmp_path.parent.name}/mmlu-out-en", "mmlu-en\0", "", "-"):
        with pytest.raises(EvaluateError, match="there is no task"):
            suites([name], Setting(setting.tokenizer, 1024, tmp_path))
    with pytest.raises(EvaluateError, match="there are no tasks"):
        suites([], setting)
    with pytest.raises(EvaluateError, match="no such folder"):
        suites(["mmlu"], Setting(setting.tokenizer, 1024, tmp_path / "nowhere"))


# --- items from a folder


def test_a_column_in_a_folder_has_a_task_for_each_subject_with_its_own_examples(setting, tmp_path):
    shipped = [item for item in load_items("mmlu-shipped-en") if item["subject"] in ("anatomy", "astronomy")]
    write(tmp_path, "mmlu-en", [item | {"question": f"New: {item['question']}"} for item in shipped])
    write(tmp_path, "mmlu-dev-en", shipped)
    (suite,) = suites(["mmlu"], Setting(setting.tokenizer, 1024, tmp_path))
    assert [task["task"] for task in suite.tasks] == ["aquila2-mmlu-en-anatomy", "aquila2-mmlu-en-astronomy"]
    model = Told(lambda request: 0)
    scores, samples = evaluate(model, [suite])
    assert scores[0].items == len(shipped) and scores[0].shots == 5 and set(samples) == {t["task"] for t in suite.tasks}
    for request in model.asked:
        context = request.args[0]
        assert context.count("Answer:") == 6 and context.count("New: ") == 1
        others = [item for item in shipped if item["question"] in context]
        assert {item["subject"] for item in others} == {request.doc["subject"]}


def test_subjects_weigh_alike_where_the_column_says_so(setting, tmp_path):
    items = load_items("cmmlu-zh")
    write(tmp_path, "cmmlu-a-zh", [item | {"subject": "a"} for item in items[:2]])
    write(tmp_path, "cmmlu-b-zh", [item | {"subject": "b"} for item in items[2:8]])
    (suite,) = suites(["cmmlu"], Setting(setting.tokenizer, 1024, tmp_path, shots=0))
    right = Told(lambda r: (r.doc["Answer"] == r.args[1].strip()) == (r.doc["subject"] == "a"))
    ((score,), _) = evaluate(right, [suite])
    assert score.value == 50 and score.items == 8
    assert (score.low, score.high) == pytest.approx([100 * part for part in wilson(2, 8)[1:]])


def test_an_item_is_never_its_own_example(setting):
    (suite,) = suites(["gsm8k-shipped-en"], setting)
    assert suite.shots == 7
    model = Told(lambda request: request.doc["answer"])
    ((score,), _) = evaluate(model, [suite])
    assert score.value == 100 and len(model.asked) == 8
    for request in model.asked:
        assert request.args[0].count(request.doc["question"]) == 1 and request.args[0].count("Question:") == 8


def test_more_examples_than_there_are_is_told(setting):
    with pytest.raises(EvaluateError, match=r"gsm8k-en: there are 8 examples, too few for 9: .* gsm8k-dev-en.jsonl"):
        suites(["gsm8k-en"], Setting(setting.tokenizer, 1024, shots=9))
    with pytest.raises(EvaluateError, match="-1 examples"):
        suites(["gsm8k-en"], Setting(setting.tokenizer, 1024, shots=-1))
    with pytest.raises(EvaluateError, match="too few for 8"):
        suites(["gsm8k-shipped-en"], Setting(setting.tokenizer, 1024, shots=8))


@pytest.mark.parametrize("name", ["mmlu-en", "mmlu-dev-en"])
def test_a_malformed_file_names_file_line_and_field(setting, tmp_path, name):
    good = load_items("mmlu-en")
    write(tmp_path, "mmlu-en", good)
    write(tmp_path, name, [*good[:2], good[2] | {"answer": 4}])
    with pytest.raises(EvaluateError, match=rf"{name}\.jsonl, line 3: the field 'answer' is '4': give one of"):
        suites(["mmlu"], Setting(setting.tokenizer, 1024, tmp_path))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"null", b'{"subject": {}}', b"\0\0"])
def test_hostile_files_are_told(setting, tmp_path, content):
    (tmp_path / "mmlu-en.jsonl").write_bytes(content)
    with pytest.raises(EvaluateError, match=r"mmlu-en\.jsonl"):
        suites(["mmlu"], Setting(setting.tokenizer, 1024, tmp_path))


def test_a_template_in_an_item_is_text(setting, tmp_path):
    """What looks like jinja, or like a path, stays what it is."""
    typed = "{{ 7 * 7 }} {% for x in range(9) %} {{ self.__class__ }}"
    write(
        tmp_path, "mmlu-en", [{"subject": "../x", "question": typed, "choices": ["a", "b", "{{c}}", "d"], "answer": 2}]
    )
    (suite,) = suites(["mmlu"], Setting(setting.tokenizer, 1024, tmp_path, shots=0))
    model = Told(lambda request: request.args[1] == " C")
    ((score,), _) = evaluate(model, [suite])
    assert score.value == 100 and typed in model.asked[0].args[0] and "C. {{c}}" in model.asked[0].args[0]
    assert "/" not in suite.tasks[0]["task"]


# --- long texts


def test_long_texts_lose_their_middle_and_are_scored_as_longbench_does(setting, tmp_path):
    item = {
        "input": "Who?",
        "context": "word " * 5000 + "end",
        "answers": ["the cat"],
        "all_classes": None,
        "length": 5001,
    }
    write(tmp_path, "hotpotqa", [item, item | {"context": "short"}])
    (suite,) = suites(["hotpotqa"], Setting(setting.tokenizer, 1024, tmp_path))
    model = Told(lambda request: "the cat" if "short" in request.args[0] else "a dog")
    ((score,), _) = evaluate(model, [suite])
    assert score.value == 50 and score.metric == "score"
    for request in model.asked:
        assert len(setting.tokenizer(request.args[0]).input_ids) + request.args[1]["max_gen_toks"] <= 1024
        assert "Who?" in request.args[0]
    (tmp_path / "hotpotqa.jsonl").write_text('{"input": 1}\n')
    with pytest.raises(LongContextError, match="hotpotqa.jsonl, line 1: answers"):
        suites(["hotpotqa"], Setting(setting.tokenizer, 1024, tmp_path))
    assert not zipfile.is_zipfile(tmp_path / "hotpotqa.jsonl")


# --- programs


def test_programs_are_not_run_unless_it_is_allowed(setting):
    for name in ("humaneval", "humaneval-en"):
        with pytest.raises(EvaluateError, match="--allow-code-execution"):
            suites([name], setting)


@contained
def test_humaneval_runs_in_our_sandbox(setting, tmp_path):
    (suite,) = suites(["humaneval"], Setting(setting.tokenizer, 1024, execute=True))
    broken = {problem.task_id for problem in human_eval()[1:4:2]}
    mark = tmp_path / "escaped"
    evil = f"    open({str(mark)!r}, 'w')\n    return 1\n"
    model = Told(lambda r: evil if r.doc["task_id"] in broken else r.doc["canonical_solution"])
    ((score,), samples) = evaluate(model, [suite], limit=4)
    assert (score.items, score.value, score.metric) == (4, 50, "pass@1")
    passed = {one["doc"]["task_id"]: one["pass@1"] for one in samples["aquila2-humaneval-en"]}
    assert {task for task, value in passed.items() if value == 0} == broken and not mark.exists()


# --- formulas


@pytest.mark.parametrize(
    "text, found",
    [
        (r"so \boxed{3} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{}", ""),
        (r"\boxed{never ends", None),
        ("none", None),
        (r"\boxed{" + "{" * 2000, None),
    ],
)
def test_what_is_in_the_last_box(text, found):
    assert boxed(text) == found


def test_formulas_that_are_written_alike():
    for other in (r"\dfrac{1}{2}", r" \tfrac{1}{2} ", r"$\left(\right)$".replace(r"\left(\right)", r"\frac{1}{2}")):
        assert same_formula(r"\frac{1}{2}", other)
    assert same_formula("(1,2)", r"\left(1, 2\right)") and same_formula("5", r"5\text{ cm}")
    for other in ("2", r"\frac{2}{1}", "", "-"):
        assert not same_formula(r"\frac{1}{2}", other)


# --- all sets with a real model, and the command


@pytest.mark.slow
def test_every_set_can_be_run(tiny):
    names = [name for name in ALL_SETS if name not in ("humaneval-en", "mmlu-shipped-en")]
    asked = suites(names, Setting(tiny[1], 1024, shots=1))
    scores, _ = evaluate(HarnessModel(*tiny, progress=False), asked, limit=2)
    assert [score.name for score in scores] == names
    for score in scores:
        assert score.items == 2 and 0 <= score.value <= 100 and score.low <= score.value + 1e-9 <= score.high + 2e-9


def test_in_a_chat_template_a_model_says_what_predict_says():
    loader = AutoLoader("aquila2", model_name="Aquila2-Nano-Chat", device="cpu")
    model, tokenizer = loader.get_model(), loader.get_tokenizer()
    template = template_for_model("Aquila2-Nano-Chat")
    asked = suites(["babi16-zh", "kinship-en"], Setting(tokenizer, 1024, template=template))
    _, samples = evaluate(HarnessModel(model, tokenizer, template=template, progress=False), asked, limit=4)
    for one in (one for own in samples.values() for one in own):
        said = model.predict(one["doc"]["question"], tokenizer, temperature=0, max_gen_len=64)
        assert one["filtered_resps"] == [said.split("\n\n")[0]]


def run(capsys, *arguments):
    status = cli.main(["evaluate", *map(str, arguments)])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("language, head", [("en", "task "), ("zh", "任务 ")])
def test_the_command_prints_writes_and_goes_on(folder, tmp_path, capsys, monkeypatch, language, head):
    results = tmp_path / "results.json"
    arguments = [folder, "--tasks", "causal-en,gsm8k-zh", "--num-fewshot", 1, "--limit", 3, "--output", results]
    arguments += ["--lang", language, "--device", "cpu"]
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and head in out and "causal-en" in out and "gsm8k-zh" in out
    kept = json.loads(results.read_text(encoding="utf-8"))
    assert [one["items"] for one in kept["scores"]] == [3, 3]
    assert len(kept["samples"]["aquila2-causal-en"]) == 3 and kept["settings"]["tasks"] == "causal-en,gsm8k-zh"
    monkeypatch.setattr(torch.nn.Embedding, "forward", None)  # a model that can answer nothing more
    status, again, told = run(capsys, *arguments)
    assert status == 0 and again == out and "results.json.journal" in told
    assert json.loads(results.read_text(encoding="utf-8")) == kept


def test_the_command_tells_what_is_wrong_in_a_line(folder, tmp_path, capsys):
    for arguments, message in [
        ([], "give a model and --tasks"),
        ([folder], "give a model and --tasks"),
        ([folder, "--tasks", "mmlu"], "mmlu: put mmlu-en.jsonl"),
        ([folder, "--tasks", "mmlu-en", "--output", tmp_path], "is a folder: give a file"),
        ([folder, "--tasks", "mmlu-en", "--limit", "0"], "the limit is 0 items"),
        ([folder, "--tasks", "mmlu-en", "--batch-size", "0"], "the batch size is 0"),
        ([folder, "--tasks", "mmlu-en", "--chat-template", "no-such"], "no template 'no-such'"),
        ([folder, "--tasks", "mmlu-en", "--chat-template"], "no template is known"),
        ([tmp_path / "none", "--tasks", "mmlu-en"], "none"),
    ]:
        status, _, told = run(capsys, *arguments, "--lang", "en")
        assert status == 2 and message in told and told.count("\n") == 1, told


def test_the_command_takes_a_template_by_name(folder, capsys):
    arguments = ["--tasks", "causal-en", "--limit", 2, "--chat-template", "aquila-v1", "--lang", "en"]
    assert run(capsys, folder, *arguments)[0] == 0


def test_the_list_names_every_task(capsys):
    status, out, _ = run(capsys, "--list", "--lang", "en")
    assert status == 0
    for name in (*GROUPS, *COLUMNS, *ALL_SETS, *LONG_TEXT):
        assert name in out
