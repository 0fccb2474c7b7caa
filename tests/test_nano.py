"""The small models that come with the book: their files, and that their cards say what was measured."""

import json
import re

import pytest
from safetensors.torch import load_file

from aquila2_tut import Aquila2Config, AutoLoader, assets, load_tokenizer
from aquila2_tut.chat import template_for_model

NAMES = ("Aquila2-Nano", "Aquila2-Nano-Chat")


def figures(row, digits, factor):
    """The figure and its interval, as a card writes them."""
    value, low, high = (f"{factor * row[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} % [{low}, {high}]" if factor == 100 else f"{value} [{low}, {high}]"


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_small_and_of_the_preset_s_shape(name):
    folder = assets.shipped(name)
    weights = load_file(folder / "model.safetensors")
    assert (folder / "model.safetensors").stat().st_size < 20_000_000
    assert sum(x.numel() for x in weights.values()) == Aquila2Config.preset(name).parameter_count
    assert {str(x.dtype) for x in weights.values()} == {"torch.bfloat16"}
    stored = json.loads((folder / "config.json").read_text())
    assert stored["use_cache"] and stored["vocab_size"] == len(load_tokenizer(name)) == 8192
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".py") == []


@pytest.mark.parametrize("card", ["README.md", "README_CN.md"])
@pytest.mark.parametrize("name", NAMES)
def test_the_cards_say_what_was_measured(name, card):
    folder = assets.shipped(name)
    said = (folder / card).read_text(encoding="utf-8")
    for table, rows in json.loads((folder / "evaluation.json").read_text()).items():
        digits, factor = {"tasks": (0, 100), "translation": (1, 1)}.get(table, (3, 1))
        for row in rows.values():
            for column, value in row.items():
                if isinstance(value, dict) and " - " not in column:
                    assert figures(value, digits, factor) in said, (table, column)
    assert len(re.findall(r"\[-?\d", said)) >= 20


def test_the_log_begins_with_the_logarithm_of_the_vocabulary_and_falls():
    log = json.loads((assets.shipped("Aquila2-Nano") / "log.json").read_text())
    assert log[0]["loss"] == pytest.approx(9.01, abs=0.1)  # ln 8192
    assert log[-1]["loss"] < 4 and log[-1]["step"] == 2800


@pytest.mark.parametrize(("said", "answer"), [("你好", "你好"), ("Who are you?", "Aquila2-Nano-Chat")])
def test_the_chat_model_talks(said, answer):
    loader = AutoLoader(model_name="Aquila2-Nano-Chat", device="cpu", local_files_only=True)
    assert template_for_model("Aquila2-Nano-Chat").name == "aquila-v1"
    assert answer in loader.get_model().predict(said, loader.get_tokenizer(), temperature=0, max_gen_len=40)
