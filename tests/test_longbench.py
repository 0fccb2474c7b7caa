"""LongBench's metrics against numbers worked out by hand and against the packages that LongBench itself calls."""

import json
import random
import sys
import warnings
import zipfile

import pytest
import torch

from aquila2_tut.chat import get_template
from aquila2_tut.config import Aquila2Config
from aquila2_tut.longcontext import errors, longbench, metrics
from aquila2_tut.longcontext.longbench import (
    HUB,
    LONG_TASKS,
    Answer,
    cut_middle,
    long_task,
    read_items,
    run_task,
    scores_by_length,
    task_score,
)
from aquila2_tut.longcontext.metrics import METRICS
from aquila2_tut.model import Aquila2ForCausalLM
from aquila2_tut.tokenizer import load_tokenizer
from aquila2_tut.tokenizer.train import train_aquila_like

WORDS = ["the", "cat", "a", "dog", "sat", "on", "mat.", "Mat", "and,", "it", "was", "warm", "an", "old", "cat!"]
ZH = ["北京大学位于北京市海淀区。", "海淀区在北京的西北部，", "大学", "它创办于1898年；", "“是的”，他说。"]

# Written for this test in LongBench's format.
ITEMS = {
    "hotpotqa": {
        "input": "In which town was the maker of the clock born?",
        "context": "Passage 1:\nThe clock was made by Ada Brook.\nPassage 2:\nAda Brook was born in Leiden {1801}.",
        "answers": ["Leiden", "the town of Leiden"],
        "length": 20,
        "language": "en",
        "all_classes": None,
    },
    "multifieldqa_zh": {
        "input": "谁修好了水泵？",
        "context": "水泵坏了三天，后来李工把它修好了。",
        "answers": ["李工"],
        "length": 17,
        "language": "zh",
        "all_classes": None,
    },
    "trec": {
        "input": "Question: How high is a giraffe?\nType:",
        "context": "Question: Who wrote it?\nType: Individual\n",
        "answers": ["Number"],
        "length": 5000,
        "language": "en",
        "all_classes": ["Number", "Individual", "Place"],
    },
}


def test_f1_by_hand():
    # "the" and punctuation go: found {cat, sat}, wanted {cat, slept, well}; one in common.
    assert METRICS["f1"]("The cat sat.", "cat slept well", ()) == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert METRICS["f1"]("cat cat", "cat", ()) == pytest.approx(2 / 3)
    assert METRICS["f1"]("...", "cat", ()) == 0.0
    # 北京 | 大学 against 北京 | 市
    assert METRICS["f1_zh"]("大学，在北京。", "北京", ()) == pytest.approx(2 / 4)


def test_rouge_l_by_hand():
    # Longest common subsequence "police the gunman" of four words each: precision = recall = 3/4.
    assert metrics.rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert metrics.rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    # Lin's own example of a union: w1 w2 and w1 w3 w5 together are four of the five words.
    found = metrics.rouge_l("w1 w2 w6 w7 w8.w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5")
    recall, precision = 4 / 5, 4 / 8
    assert found == pytest.approx(2 * recall * precision / (recall + precision))
    assert metrics.rouge_l("", "a") == metrics.rouge_l("a", "...") == 0.0
    assert METRICS["rouge_zh"]("猫坐在垫子上", "猫坐在垫子上", ()) == pytest.approx(1.0)


def test_the_other_metrics_by_hand():
    classes = ("Number", "Number of people", "Place")
    assert METRICS["classification"]("It is Place", "Place", classes) == 1.0
    assert METRICS["classification"]("Place or Number", "Place", classes) == 0.5
    # "Number" stands in the name of the right class too, and does not count as a second guess.
    assert METRICS["classification"]("Number of people", "Number of people", classes) == 1.0
    assert METRICS["classification"]("Number of people", "Place", classes) == 0.0
    assert METRICS["count"]("There are 5, or 6, no: 5", "5", ()) == pytest.approx(2 / 3)
    assert METRICS["count"]("none", "5", ()) == 0.0
    assert METRICS["retrieval"]("Paragraph 12", "Paragraph 12", ()) == 1.0
    assert METRICS["retrieval"]("段落3 或 段落4", "段落4", ()) == 0.5
    assert METRICS["retrieval"]("Paragraph 12", "Paragraph 1", ()) == 0.0
    # The comment and the fence are no code; "x = 1" and "x = 12" have 5 letters in common of 5 + 6.
    assert METRICS["edit"]("```\n# next\nx = 1\ny", "x = 12", ()) == 0.91
    assert METRICS["edit"]("# only a comment", "x", ()) == 0.0
    with pytest.raises(errors.LongContextError, match="names no paragraph"):
        METRICS["retrieval"]("7", "seven", ())


def test_rouge_l_equals_the_package():
    rouge, dice = pytest.importorskip("rouge").Rouge(), random.Random(0)
    for _ in range(300):
        one, other = (" ".join(["it", *dice.choices([*WORDS, "."], k=dice.randint(1, 25))]) for _ in range(2))
        expected = rouge.get_scores([one], [other], avg=True)["rouge-l"]["f"]
        assert metrics.rouge_l(one, other) == pytest.approx(expected, abs=1e-12), (one, other)


def test_long_sentences_are_compared_where_the_package_gives_up():
    rouge, long = pytest.importorskip("rouge").Rouge(), " ".join(map(str, range(sys.getrecursionlimit())))
    with pytest.raises(RecursionError):
        rouge.get_scores([long], [long], avg=True)
    assert metrics.rouge_l(long, long) == pytest.approx(1.0)


def test_edit_similarity_equals_the_package():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz, dice = pytest.importorskip("fuzzywuzzy.fuzz"), random.Random(1)
    for _ in range(300):
        one, other = ("".join(dice.choices("abc =(x)", k=dice.randint(1, 40))) for _ in range(2))
        assert METRICS["edit"](one, other, ()) == fuzz.ratio(one, other) / 100


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("f1", "qa_f1_score"),
        ("f1_zh", "qa_f1_zh_score"),
        ("rouge", "rouge_score"),
        ("rouge_zh", "rouge_zh_score"),
        ("count", "count_score"),
        ("classification", "classification_score"),
    ],
)
def test_metrics_equal_those_of_lm_eval(ours, theirs):
    package = pytest.importorskip("lm_eval.tasks.longbench.metrics")
    score = getattr(package, theirs)
    dice, classes = random.Random(2), ("cat", "old cat", "mat", "dog")
    for _ in range(100):
        if ours.endswith("zh"):
            one, other = ("".join(dice.choices(ZH, k=dice.randint(1, 4))) for _ in range(2))
        else:
            one = " ".join(dice.choices([*WORDS, "12", "7"], k=dice.randint(1, 15)))
            other = {"count": "12", "classification": dice.choice(classes)}.get(
                ours, " ".join(dice.choices(WORDS, k=9))
            )
        assert METRICS[ours](one, other, classes) == pytest.approx(score(one, other, all_classes=classes), abs=1e-9)


def test_every_task_can_be_asked_and_scored():
    assert len(LONG_TASKS) == 21
    assert sorted({task.language for task in LONG_TASKS.values()}) == ["code", "en", "zh"]
    for task in LONG_TASKS.values():
        chinese = any("\u4e00" <= letter <= "\u9fff" for letter in task.prompt)
        assert chinese == (task.language == "zh") and task.metric in METRICS
        item = longbench.Item("{what?}", "the {long} text", ("Paragraph 1",), ("Paragraph 1",), 3)
        assert "the {long} text" in task.ask(item)
        if "{input}" in task.prompt:
            assert "{what?}" in task.ask(item)
        if task.metric != "count":
            assert task.score("Paragraph 1", item) == pytest.approx(1.0)


@pytest.fixture
def folder(tmp_path):
    for name, fields in ITEMS.items():
        lines = [json.dumps(fields | {"dataset": name, "_id": str(n)}, ensure_ascii=False) for n in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_items_from_a_folder_an_archive_and_the_hub(folder, tmp_path, monkeypatch):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ITEMS:
            file.write(folder / f"{name}.jsonl", f"data/{name}.jsonl")
            file.write(folder / f"{name}.jsonl", f"data/{name}_e.jsonl")
    asked = []
    monkeypatch.setattr(
        longbench.huggingface_hub, "hf_hub_download", lambda *where, **rest: asked.append((where, rest)) or str(archive)
    )
    for name, fields in ITEMS.items():
        found = read_items(name, folder)
        assert found == read_items(name, archive) == read_items(f"{name}_e", archive) == read_items(name)
        assert len(found) == 2 and found[0].context == fields["context"]
        assert found[0].answers == tuple(fields["answers"])
        assert found[0].all_classes == tuple(fields["all_classes"] or ())
    assert asked[0] == (HUB, {"repo_type": "dataset"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"hotpotqa\.jsonl, line 2: not valid JSON"),
        ("[1]", "line 2: a JSON object is needed"),
        ('{"input": "", "context": "", "answers": [], "length": 1}', "answers: there is none"),
        ('{"input": "", "context": "", "answers": "x", "length": 1}', "answers: must be a list of texts"),
        ('{"input": "", "context": 3, "answers": ["x"], "length": 1}', "context: must be a text, not 3"),
        ('{"input": "", "context": "", "answers": ["x"], "length": "1"}', "length: must be a whole number, not '1'"),
    ],
)
def test_lines_that_are_no_items_are_named(folder, line, message):
    file = folder / "hotpotqa.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(errors.LongContextError, match=message):
        read_items("hotpotqa", folder)


def test_what_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(errors.LongContextError, match="no task 'squad'; it has narrativeqa, qasper"):
        long_task("squad")
    with pytest.raises(errors.LongContextError, match=r"has no qasper_e\.jsonl"):
        read_items("qasper_e", folder)
    with pytest.raises(errors.LongContextError, match="neither a folder nor a zip"):
        read_items("trec", folder / "trec.jsonl")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    train_aquila_like([fields["context"] for fields in ITEMS.values()] * 3, 300).save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def test_the_middle_is_cut(tokenizer):
    text = "猫坐在垫子上，" + " and the clock was made" * 20 + "，没有人问它为什么。"
    ids = tokenizer(text).input_ids
    for length in (7, 20, 33):
        cut = cut_middle(tokenizer, text, length)
        half = length // 2
        expected = tokenizer.decode(ids[:half]).rstrip("\ufffd") + tokenizer.decode(ids[-half:]).lstrip("\ufffd")
        assert cut == (expected, len(ids) - 2 * half)
        assert "\ufffd" not in cut.text
    assert cut_middle(tokenizer, text, len(ids)) == (text, 0)


@pytest.mark.parametrize("template", [None, "aquila-v1"])
def test_a_task_is_run(tokenizer, folder, template):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Aquila2Config(**shape, vocab_size=len(tokenizer), pad_token_id=0, max_position_embeddings=256)
    model = Aquila2ForCausalLM(config).eval()
    items = read_items("hotpotqa", folder)
    template = template and get_template(template)
    answers = run_task(model, tokenizer, "hotpotqa", items, template)  # fits the context: predict would refuse it
    assert [answer.lost > 0 for answer in answers] == [True, True]
    assert all(answer.score == long_task("hotpotqa").score(answer.output, items[0]) for answer in answers)
    assert run_task(model, tokenizer, "hotpotqa", items, template, length=64)[0].lost > answers[0].lost
    with pytest.raises(errors.LongContextError, match="are left for the prompt"):
        run_task(
            Aquila2ForCausalLM(Aquila2Config(**{**config.to_dict(), "max_position_embeddings": 40})),
            tokenizer,
            "hotpotqa",
            items,
            template,
        )


def test_scores_are_means_in_hundredths(folder):
    task, items = long_task("trec"), read_items("trec", folder)
    assert task.score("\n\nNumber\nQuestion: Place", items[0]) == 1.0  # of a few-shot answer, the first line counts
    answers = [Answer("", 1.0, 0), Answer("", 0.5, 0)]
    assert task_score(answers) == 75.0
    assert scores_by_length(answers, items) == {"4-8k": 75.0}
    with pytest.raises(errors.LongContextError, match="no answers"):
        task_score([])
