"""Accuracy, chrF and the simple answers beside them, against cases counted by hand and definitions written out."""

import math
from collections import Counter
from itertools import islice

import pytest
import torch

from aquila2_tut import AutoLoader, assets
from aquila2_tut.config import Aquila2Config
from aquila2_tut.data import Instance, generate
from aquila2_tut.evaluate import (
    EvaluateError,
    NearestPair,
    accuracy,
    ask,
    chrf,
    guesses,
    held_out,
    majority,
    translations,
    wilson,
)
from aquila2_tut.evaluate.generated import REASONING
from aquila2_tut.model import Aquila2ForCausalLM
from aquila2_tut.tokenizer import load_tokenizer
from aquila2_tut.tokenizer.train import train_aquila_like

PAIRS = [
    ("Open File", "打开文件"),
    ("Close File", "关闭文件"),
    ("Open Folder", "打开文件夹"),
    ("Save All", "全部保存"),
    ("Restart the kernel?", "重启内核？"),
]


def instance(question, answer, language="en", reasoning="x"):
    return Instance("babi15", language, question, answer, reasoning, "id")


# --- asking ---


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_answers_in_batches_are_those_of_single_questions(tmp_path, batch_size):
    questions = ["Why?", "What is Bella afraid of, and who told you so?", "豆豆怕什么？", "Who?"]
    train_aquila_like(questions, 300).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    torch.manual_seed(0)
    config = Aquila2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    model = Aquila2ForCausalLM(config).eval()
    alone = [
        model.predict(question, tokenizer, temperature=0, max_gen_len=9, convo_template="aquila-v1")
        for question in questions
    ]
    assert len(set(alone)) > 1
    assert ask(model, tokenizer, questions, batch_size=batch_size, max_gen_len=9, template="aquila-v1") == alone


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("task", REASONING)
def test_questions_are_held_out(task, language):
    found = held_out(task, language, 20)
    assert len({one.id for one in found}) == 20
    assert {(one.task, one.language) for one in found} == {(task, language)}
    assert not {one.id for one in found} & {one.id for one in islice(generate(task, language, "train"), 500)}
    assert found[:5] == held_out(task, language, 5) != held_out(task, language, 5, seed=1)
    assert all(one.reasoning for one in found)


# --- accuracy and the simple answers ---


def test_accuracy_counts_right_answers():
    asked = held_out("arithmetic", "en", 10)
    outputs = [one.reasoning + f" So the answer is {one.answer}." for one in asked[:7]] + ["I do not know."] * 3
    assert accuracy(asked, outputs) == wilson(7, 10)
    with pytest.raises(EvaluateError, match="9 outputs for 10"):
        accuracy(asked, outputs[:9])
    with pytest.raises(EvaluateError):
        accuracy([], [])


def test_majority():
    training = [instance("?", answer) for answer in ("cats", "wolves", "cats")]
    assert majority(training, 3) == ["cats"] * 3
    with pytest.raises(EvaluateError, match="no training"):
        majority([], 1)


@pytest.mark.parametrize(
    ("language", "question", "possible", "named"),
    [
        ("en", "Cats fear wolves. What do mice fear?", ["cats", "wolves", "bears", "mice"], {"cats", "wolves", "mice"}),
        ("en", "Wildcats fear redwolves.", ["cats", "wolves", "bears"], {"cats", "wolves", "bears"}),
        ("zh", "熊猫怕狼。豆豆怕什么？", ["熊猫", "猫", "狼", "虎"], {"熊猫", "狼"}),
        ("zh", "豆豆有12个苹果，送人5个。", ["1", "2", "12", "5"], {"12", "5"}),
        ("en", "A sister-in-law and a brother.", ["sister", "sister-in-law", "brother"], {"sister-in-law", "brother"}),
    ],
)
def test_guesses_are_among_what_the_story_names(language, question, possible, named):
    training = [instance("?", answer, language) for answer in possible]
    asked = [instance(question, "?", language)] * 200
    assert set(guesses(training, asked)) == named
    assert guesses(training, asked) == guesses(training, asked) != guesses(training, asked, seed=1)
    with pytest.raises(EvaluateError, match="no training"):
        guesses([], asked)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_guess_among_the_colours_of_a_story_is_right_as_often_as_it_must_be(language):
    asked, training = held_out("babi16", language, 400), list(islice(generate("babi16", language, "train"), 400))
    colours = {one.answer for one in training}
    chance = sum(1 / sum(colour in one.question for colour in colours) for one in asked) / len(asked)
    assert 0.25 < chance < 0.45
    found = accuracy(asked, guesses(training, asked))
    assert abs(found.value - chance) < 3 * math.sqrt(chance * (1 - chance) / len(asked))


# --- translation ---


def test_sentences_to_translate():
    found = translations(PAIRS, "translate-zh-en", "zh")
    assert {(one.source, one.reference) for one in found} == {(chinese, english) for english, chinese in PAIRS}
    assert all(one.source in one.question and one.question != one.source for one in found)
    assert translations(PAIRS, "translate-zh-en", "zh", 2) == found[:2]
    assert [one.source for one in translations(PAIRS, "translate-en-zh", "en", seed=5)] != [
        one.source for one in translations(PAIRS, "translate-en-zh", "en", seed=6)
    ]


def test_chrf_by_hand():
    # "ab" for "abc": precision 1 and 1, recall 2/3 and 1/2 with one and two characters; F2 = 5 P R / (4 P + R)
    recall = (2 / 3 + 1 / 2) / 2
    pytest.importorskip("sacrebleu")
    assert chrf(["ab"], ["abc"]).value == pytest.approx(100 * 5 * recall / (4 + recall))
    assert chrf(["打开文件", "保存"], ["打开文件", "保存"]) == (100, 100, 100)
    assert chrf(["x", "y"], ["打开", "保存"]) == (0, 0, 0)
    value, low, high = chrf(["打开文件", "y", "关闭"], ["打开文件", "保存", "关上"])
    assert 0 <= low < value < high <= 100
    with pytest.raises(EvaluateError, match="1 outputs for 2"):
        chrf(["a"], ["a", "b"])


def reference_similarity(one, other, sources):
    """Cosine of tf-idf vectors of 1 to 4 characters, from the definition."""

    def grams(text):
        text = f" {text.lower()} "
        return Counter(text[i:j] for i in range(len(text)) for j in range(i + 1, min(i + 4, len(text)) + 1))

    def vector(text):
        found = {}
        for gram, count in grams(text).items():
            held = sum(gram in f" {source.lower()} " for source in sources)
            if held:
                found[gram] = count * (math.log((1 + len(sources)) / (1 + held)) + 1)
        return found

    a, b = vector(one), vector(other)
    return sum(w * b.get(g, 0) for g, w in a.items()) / math.sqrt(
        sum(w * w for w in a.values()) * sum(w * w for w in b.values())
    )


@pytest.mark.parametrize("direction", [1, -1])
def test_the_nearest_pair_is_that_of_the_definition(direction):
    made = [(f"Open {a} {b}", f"打开{a}的{b}") for a in ("file", "tab", "编辑器") for b in ("now", "later", "文件")]
    pairs = [pair[::direction] for pair in PAIRS + made]
    sources, memory = [source for source, _ in pairs], NearestPair(pairs)
    for asked in ("Open the file", "Closing files", "打开文件夹", "文件保存", "kernel", "tab later"):
        scores = [reference_similarity(asked, source, sources) for source in sources]
        assert memory.translate(asked) == pairs[scores.index(max(scores))][1]


def test_what_is_known_comes_back():
    memory = NearestPair(PAIRS)
    assert [memory.translate(english) for english, _ in PAIRS] == [chinese for _, chinese in PAIRS]
    assert memory.translate("☃☃☃") in [chinese for _, chinese in PAIRS]
    with pytest.raises(EvaluateError, match="no pairs"):
        NearestPair([])


# --- what the small chat model is said to be ---


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "zh"])
def test_nano_chat_is_right_more_often_than_a_guess(language):
    folder = assets.shipped("Aquila2-Nano-Chat")
    if folder is None:
        pytest.skip("data/Aquila2-Nano-Chat is not there yet")
    loader = AutoLoader(model_name=str(folder), device="cpu", local_files_only=True)
    asked, training = held_out("kinship", language, 48), list(islice(generate("kinship", language, "train"), 500))
    outputs = ask(loader.get_model(), loader.get_tokenizer(), [one.prompt() for one in asked], max_gen_len=40)
    assert accuracy(asked, outputs).low > accuracy(asked, guesses(training, asked)).value
