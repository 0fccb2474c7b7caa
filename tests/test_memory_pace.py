"""The time of a step in closed form, beside the rehearsal that runs the code and counts."""

import pytest

from aquila2_tut.config import Aquila2Config
from aquila2_tut.memory import rehearse
from aquila2_tut.memory.compared import penalty_seconds
from aquila2_tut.memory.formula import MAPS
from aquila2_tut.memory.pace import pace_of
from aquila2_tut.memory.rehearse import EFFICIENCY, rehearse_setting
from aquila2_tut.memory.setting import setting

BOUND = 0.09  # of the least time, as the module's docstring says
# Widths of the released models with two layers: the first, which may need less, and one for all others.
WIDTHS = {
    size: Aquila2Config.preset(name, num_hidden_layers=2, max_position_embeddings=8192)
    for size, name in (("7B", "AquilaChat2-7B"), ("34B", "AquilaChat2-34B"))
}
SHAPES = {
    "default": {},
    "short": {"batch_size": 1, "seq_len": 512},
    "long": {"batch_size": 2, "seq_len": 8192},
    "kept": {"checkpointing": False, "seq_len": 1024},
    "plain": {"loss": "plain", "gpu": "H100"},
    "upstream": {"recipe": "upstream", "gpus": 1, "strategy": ""},
    "r 64": {"r": 64, "targets": ("all-linear",), "dropout": 0.0},
    "behind": {"targets": ("o_proj", "down_proj"), "checkpointing": False, "gpu": "L20"},
}
GRID = [
    (size, method, shape)
    for size in WIDTHS
    for method in ("full", "lora", "qlora")
    for shape in SHAPES
    if not (method == "full" and "targets" in SHAPES[shape]) and not (size == "34B" and shape == "long")
]


@pytest.mark.parametrize(("size", "method", "shape"), GRID)
def test_it_is_what_a_rehearsal_counts(size: str, method: str, shape: str):
    found = rehearse(WIDTHS[size], method, **SHAPES[shape])
    derived = pace_of(found.setting)
    assert derived.flops == found.flops
    assert derived.least_seconds == pytest.approx(found.least_seconds, rel=BOUND)


@pytest.mark.parametrize("name", MAPS)
def test_nothing_goes_back_beyond_the_first_adapter(name: str):
    wanted = setting(model="Aquila2-Nano", method="lora", seq_len=64, targets=(name,), checkpointing=False)
    assert pace_of(wanted).flops == rehearse_setting(wanted).flops


def test_all_of_a_models_layers_count():
    found = rehearse("Aquila2-7B", "qlora", batch_size=2)
    derived = pace_of(found.setting)
    assert derived.flops == found.flops
    assert derived.seconds_per_step == pytest.approx(found.seconds_per_step, rel=0.05)
    assert derived.tokens_per_second == pytest.approx(found.tokens_per_second, rel=0.05)


def test_the_four_bits_cost_what_the_chapter_says():
    for checkpointing in (False, True):
        wanted = setting(model="Aquila2-7B", method="qlora", targets=("all-linear",), checkpointing=checkpointing)
        # The chapter leaves the scales out: an eighth of a bit a weight, after 4 and 16 bits.
        assert pace_of(wanted).seconds["four bits"] == pytest.approx(penalty_seconds(wanted), rel=0.03)


def test_no_time_is_below_that_of_the_arithmetic():
    for gpu in ("T4", "A100-80G", "H200"):
        pace = pace_of(setting(model="AquilaChat2-34B", gpu=gpu, seq_len=4096))
        assert pace.flops / pace.setting.card.flops < pace.least_seconds == EFFICIENCY * pace.seconds_per_step


def test_cards_share_the_optimizer_and_nothing_else():
    alone, eight = (
        pace_of(setting(model="Aquila2-7B", method="full", gpus=n, strategy=s)) for n, s in ((1, ""), (8, "zero2"))
    )
    assert eight.seconds.pop("optimizer") == pytest.approx(alone.seconds.pop("optimizer") / 8)
    assert eight.seconds == alone.seconds
    assert eight.flops == alone.flops


def test_what_a_million_tokens_cost():
    pace = pace_of(setting(gpus=2))
    hours = 1e6 / pace.tokens_per_second / 3600
    assert pace.cost_per_million(3.0) == pytest.approx(hours * 3.0)
