"""Answer checks of the workshop: the answers against arithmetic by hand, and what a participant is told."""

import math

import numpy as np
import pytest

from aquila2_tut.memory.errors import RehearsalError
from aquila2_tut.memory.formula import formula
from aquila2_tut.memory.questions import QUESTIONS, other_models, question
from aquila2_tut.show import check

HEAD = 8192 * 128256
NF4 = 4 + 8 / 64 + 32 / 64 / 256  # bits a weight: its code, its share of a scale, and of the scale of scales
BY_HAND = {
    "saved-7b": 32 * (4 * 4096**2 + 3 * 4096 * 11008) * (16 - NF4) / 8 / 1e9,
    "saved-smol": 30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536) * (32 - NF4) / 8 / 1e9,
    "lost-a100": 1e3 * 3 * 6_476_005_376 * 2.5 / 2.039e12,
    "share-512": 100 * 1.25 / 512 * 312e12 / 2.039e12,
    "ex-lvq-one": 16 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192) * (16 - NF4) / 8 / 1e9,
    "ex-lvq-half": (8_030_261_248 * 2 - 32 * (4096**2 + 1024 * 4096) * (16 - NF4) / 8) / 2**30,
    "ex-lvq-tiny": 2 * (3 * 2048 + 5632) * 22 * 8 * 512 / 1e9,
    "ex-lvq-cast": 36 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 12288) * (16 - NF4) / 8 / 1e9,
    "ex-lvq-infer": (2 * 2 * 32000 * 4096 + 2 * 32 * 384 * 32000 + 2 * 32 * 384 * 32 * 2 * 1024) / 1e9,
    "ex-lvq-head": HEAD * (16 - NF4) / 8 / 1e9,
    "ex-lvq-tables": 13.6e9 / (2 * 151936 * 4096),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_an_answer_is_worked_out_by_hand(name):
    assert QUESTIONS[name].answer() == pytest.approx(BY_HAND[name], rel=2e-3)


def test_the_two_answers_that_are_too_long_for_a_hand_are_those_of_the_solutions():
    tiny = other_models()["TinyLlama-1.1B"]
    fields = {"batch_size": 1, "checkpointing": False, "loss": "plain", "seq_len": 8192}
    lora = formula(tiny, "lora", r=64, targets=("all-linear",), **fields)
    assert QUESTIONS["ex-lvq-full"].answer() == pytest.approx(lora.peak_bytes / 1e9)
    fields = {"batch_size": 1, "seq_len": 2048, "checkpointing": False, "dropout": 0.0}
    few, many = (
        formula(targets=targets, **fields).terms["activations"] for targets in (("q_proj", "v_proj"), ("all-linear",))
    )
    masks = 32 * 2048 * (6 * 4096 + 11008)  # a byte for each input of each map, if there is dropout
    assert QUESTIONS["ex-lvq-inputs"].answer() == pytest.approx((many + masks - few) / 1e9)


def test_every_question_is_asked_of_an_exercise_or_a_prediction():
    assert set(BY_HAND) | {"ex-lvq-full", "ex-lvq-inputs"} == set(QUESTIONS)
    assert all(0 < asked.within <= 0.1 and asked.unit for asked in QUESTIONS.values())


def test_others_have_as_many_parameters_as_their_makers_say():
    made = {name: config.parameter_count / 1e9 for name, config in other_models().items()}
    said = {"TinyLlama-1.1B": 1.10, "Llama-3.2-1B": 1.24, "Llama-3.1-8B": 8.03, "Ministral-8B": 8.02}
    assert made == pytest.approx(said, rel=5e-3)


@pytest.mark.parametrize(
    ("value", "verdict"), [(9.6, "right"), (9.2, "right"), (8.9, "too little"), (10.4, "too much")]
)
def test_a_prediction_is_right_within_its_tolerance(value, verdict, capsys):
    check("saved-7b", value)
    said = capsys.readouterr().out
    assert verdict in said
    assert ("9.61" in said) == (verdict == "right"), "the answer is told to those who have found it, and to no others"


@pytest.mark.parametrize("value", [np.float32(1.44), np.int64(1), 1])
def test_numbers_of_numpy_are_numbers(value, capsys):
    check("ex-lvq-one", value)
    assert "not a number" not in capsys.readouterr().out


@pytest.mark.parametrize("value", ["9.6", "nine", None, True, math.nan, math.inf, [9.6], 9.6j])
def test_what_is_no_number_is_said_to_be_none(value, capsys):
    check("saved-7b", value)
    assert capsys.readouterr().out == (
        f"saved-7b: {value!r} is not a number; write it in GB, without the unit and without quotes, such as 1.5\n"
    )


def test_an_unknown_label_names_those_that_there_are():
    with pytest.raises(RehearsalError, match=r"no question 'saved-8b'; the labels are saved-7b, .*ex-lvq-tables"):
        question("saved-8b")


@pytest.mark.parametrize("value", [9.6, 1, "九"])
def test_a_chinese_page_is_answered_in_chinese(value, capsys, monkeypatch):
    monkeypatch.setenv("AQUILA2_TUT_LANG", "zh")
    check("saved-7b", value)
    said = capsys.readouterr().out
    assert said.startswith("saved-7b：")
    assert any(word in said for word in ("对了", "少了", "不是数"))
