"""Figures of LoRA against Q-LoRA, the derivation that they draw, and the file of rehearsals."""

import numpy as np
import pytest
import scipy.stats
from figures import described, draw, well_made

from aquila2_tut import Aquila2Config
from aquila2_tut.memory.compared import compared, linear_weights, penalty_seconds, saved_bytes
from aquila2_tut.memory.rehearse import rehearse, rehearse_setting
from aquila2_tut.memory.setting import setting
from aquila2_tut.show import loss_differences, plot_adapters, plot_lengths, plot_published, table_rows
from aquila2_tut.train.published import measured_sweep

ROWS = {
    128: {"lora": {"peak": 3e9, "seconds": 0.1}, "qlora": {"peak": 1e9, "seconds": 0.2}},
    512: {"lora": {"peak": 4e9, "seconds": 0.4}, "qlora": {"peak": 2e9, "seconds": 0.5}},
}


def some_run(maps, r, bits, *losses):
    """A row as `benchmarks/lora_sweep.py` writes it."""
    runs = [{"seed": seed, "loss": loss, "right": 0.5} for seed, loss in enumerate(losses, start=1)]
    return {"maps": maps, "r": r, "bits": bits, "trained": 1000 * r, "loss": {"value": sum(losses) / 3}, "runs": runs}


SWEEP = [
    some_run("all", 2, 32, 0.5, 0.4, 0.45),
    some_run("all", 8, 32, 0.3, 0.25, 0.2),
    some_run("q+v", 8, 32, 0.7, 0.6, 0.65),
    some_run("all", 8, 4, 0.32, 0.24),
    some_run("q+v", 8, 8, 0.75),
]
FIGURES = {
    "adapters": lambda: plot_adapters(SWEEP),
    "lengths": lambda: plot_lengths(ROWS, 0.1),
    "measured": lambda: plot_lengths(ROWS),
    "published": lambda: plot_published({"7B LoRA": (29.4e9, 29e9, True), "34B": (37.7e9, 53.7e9, False)}),
}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_well_made(name, language, shown, monkeypatch):
    well_made(FIGURES[name], language, shown, monkeypatch)


def test_lengths_are_told_in_words(shown, monkeypatch):
    said = described(draw(FIGURES["lengths"], "en", shown, monkeypatch))
    assert said.endswith("512 tokens: LoRA 4.00 GB, Q-LoRA 2.00 GB, which takes 1.25 times as long")


def test_a_run_that_cannot_have_been_is_told_of(shown, monkeypatch):
    said = described(draw(FIGURES["published"], "en", shown, monkeypatch))
    first, second = said.split("; ")
    assert first == "7B LoRA: 29.4 GB published, 29.0 rehearsed"
    assert second.endswith(", too slow a card for the time printed")


def test_the_sweep_is_told_in_words(shown, monkeypatch):
    said = described(draw(FIGURES["adapters"], "en", shown, monkeypatch))
    assert "all maps, rank 2: 0.450; all maps, rank 8: 0.250; q+v, rank 8: 0.650" in said
    assert said.endswith("With NF4 instead: all maps, 8: +0.020, -0.010")


def test_differences_are_of_the_same_seed():
    assert loss_differences(SWEEP) == {("all", 8): [pytest.approx(0.02), pytest.approx(-0.01)]}
    assert loss_differences(SWEEP, 8) == {("q+v", 8): [pytest.approx(0.05)]}


def test_the_saving_is_counted_by_hand():
    """NF4: half a byte a weight, a byte for each 64, four bytes for each 256 of those, and four for their mean."""
    config = Aquila2Config.preset("AquilaChat2-7B")
    shapes = 4 * [(4096, 4096)] + 3 * [(11008, 4096)]
    assert linear_weights(config) == 32 * sum(a * b for a, b in shapes) == 6_476_005_376
    stored = 32 * sum(a * b // 2 + a * b // 64 + a * b // 64 // 256 * 4 for a, b in shapes)
    assert saved_bytes(config) == pytest.approx(2 * linear_weights(config) - stored, rel=1e-4)
    assert saved_bytes(config, each=4) - saved_bytes(config) == 2 * linear_weights(config)


def test_the_penalty_is_three_passes_over_the_memory():
    wanted = setting(model="AquilaChat2-7B", gpu="A100-80G")
    assert penalty_seconds(wanted) == pytest.approx(3 * 6_476_005_376 * 2.5 / 2.039e12)
    assert penalty_seconds(setting(checkpointing=False)) == pytest.approx(2 / 3 * penalty_seconds(wanted))


@pytest.mark.parametrize("tokens", [64, 512])
def test_a_rehearsed_penalty_is_the_derived_one(tokens):
    """A model wide enough that scales and small operators hardly count; without them, a tenth is left."""
    config = Aquila2Config(
        vocab_size=1000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=2,
        num_attention_heads=16,
        max_position_embeddings=2048,
    )
    found = {}
    for method in ("lora", "qlora"):
        wanted = setting(model=config, method=method, batch_size=1, seq_len=tokens)
        found[method] = rehearse_setting(wanted).least_seconds
    assert found["qlora"] - found["lora"] == pytest.approx(penalty_seconds(wanted), rel=0.1)


def test_the_rows_of_the_file_keep_to_the_derivation():
    table = compared()
    assert list(table_rows(table["lengths"])) == [128, 256, 512, 1024, 2048, 4096, 8192]
    saved = saved_bytes(Aquila2Config.preset("AquilaChat2-7B"))
    penalty = penalty_seconds(setting(model="AquilaChat2-7B", gpu=table["conditions"]["gpu"]))
    for row in table_rows(table["lengths"]).values():
        lora, qlora = row["lora"], row["qlora"]
        assert lora["flops"] == qlora["flops"]
        assert 0.99 * saved < lora["peak"] - qlora["peak"] < 1.001 * saved  # less: a matrix made numbers, 93 MB
        assert qlora["seconds"] - lora["seconds"] == pytest.approx(penalty, rel=0.03)
    for row in table["readme"]:
        assert row["derived"] == pytest.approx(row["peak"], rel=0.03)


def test_a_row_of_the_file_is_rehearsed_again():
    row = table_rows(compared()["lengths"])[512]["qlora"]
    again = rehearse("AquilaChat2-7B-16K", "qlora", batch_size=1, seq_len=512)
    assert (again.peak_bytes, again.flops) == (row["peak"], row["flops"])
    assert again.least_seconds == pytest.approx(row["seconds"], abs=1e-5)


def test_published_rows_name_their_source():
    for row in compared()["published"]:
        assert row["source"] and row["seconds"][1] > row["seconds"][0] and row["memory"][1] < row["memory"][0]


def test_the_sweeps_file_counts_as_its_model_does():
    """Trained: r numbers for each input and each output of an adapted map."""
    config = Aquila2Config.preset("Aquila2-Nano")
    width, keys, ffn = config.hidden_size, config.num_key_value_heads * config.head_dim, config.intermediate_size
    attention = {"q": 2 * width, "k": width + keys, "v": width + keys, "o": 2 * width}
    sides = {"q+v": attention["q"] + attention["v"], "attention": sum(attention.values())}
    sides["all"] = sides["attention"] + 3 * (width + ffn)
    for row in measured_sweep()["rows"]:
        assert row["trained"] == config.num_hidden_layers * row["r"] * sides[row["maps"]]


def test_the_sweeps_file_says_what_its_runs_say():
    sweep = measured_sweep()
    for row in sweep["rows"]:
        seeds = [run["seed"] for run in row["runs"]]
        assert seeds == sweep["conditions"]["seeds"][: len(seeds)]
        for what in ("loss", "right"):
            values = [run[what] for run in row["runs"]]
            assert row[what]["value"] == pytest.approx(np.mean(values), abs=1e-4)
            if np.std(values) > 0:  # scipy has no interval for values that are all the same
                found = scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values))
                assert (row[what]["low"], row[what]["high"]) == pytest.approx(found, abs=2e-4)
