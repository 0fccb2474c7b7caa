"""Rehearsals against real steps, the closed form, torch's own counters and the original README's table."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import aquila2_tut
from aquila2_tut.cli import main
from aquila2_tut.config import Aquila2Config
from aquila2_tut.data.packing import Row
from aquila2_tut.memory import RehearsalError, formula, measure, rehearse
from aquila2_tut.memory.allocator import CachingAllocator, reserved_bytes
from aquila2_tut.memory.formula import formula_of
from aquila2_tut.memory.hardware import GPUS
from aquila2_tut.memory.measure import MemoryCallback, difference, measured_step
from aquila2_tut.memory.rehearse import tracked
from aquila2_tut.memory.setting import setting
from aquila2_tut.memory.stage import empty_model, furnish
from aquila2_tut.memory.tracker import Tracker
from aquila2_tut.model import Aquila2ForCausalLM
from aquila2_tut.model.costs import allocated_bytes
from aquila2_tut.model.layers import torch_products
from aquila2_tut.train.recipe import Run, arguments
from aquila2_tut.train.trainer import Aquila2Trainer

SHARED = {"vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "narrow": Aquila2Config(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        **SHARED,
    ),
    "wide": Aquila2Config(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        **SHARED,
    ),
    "nano": "Aquila2-Nano",
    "smollm2": "SmolLM2-135M",
}
WAYS = {
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora"},
    "full": {"method": "full", "optimizer": "adamw"},
    "full-8bit": {"method": "full"},
    "lora-kept": {"method": "lora", "checkpointing": False},
    "lora-plain": {"method": "lora", "loss": "plain"},
    "upstream": {"method": "lora", "recipe": "upstream", "gpus": 1, "strategy": ""},
}
REAL = [(m, way) for m in ("narrow", "wide") for way in WAYS] + [
    *(("nano", way) for way in ("lora", "qlora", "full", "lora-kept")),
    *(("smollm2", way) for way in ("lora", "lora-plain")),
]


@pytest.mark.parametrize(("model", "way"), REAL)
def test_a_rehearsal_is_what_a_real_step_takes(model: str, way: str):
    wanted = setting(model=MODELS[model], batch_size=2, seq_len=64, **WAYS[way])
    real, fake = measured_step(wanted), tracked(wanted, "cpu")
    at, rehearsed = real.moments[real.peak], fake.moments[fake.peak]
    assert rehearsed.bytes == pytest.approx(at.bytes, rel=0.01)
    assert (rehearsed.op, rehearsed.stage, rehearsed.line) == (at.op, at.stage, at.line)
    labels = [{a.label for a in tracker.at(tracker.peak)} for tracker in (real, fake)]
    assert labels[0] == labels[1]


def test_products_by_onednn_take_as_much():
    wanted = setting(
        model=MODELS["narrow"],
        batch_size=2,
        seq_len=64,
        method="lora",
        autocast=False,
        **{"precision": "float32", "weights": "float32"},
    )
    peaks = [t.moments[t.peak].bytes for t in (measured_step(wanted), measured_step(wanted, on_onednn=True))]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


def test_the_account_is_that_of_torchs_own_profiler():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(4)))
    x = torch.randn(512, 256)

    def step() -> None:
        model(x).square().mean().backward()
        model.zero_grad()

    with measure(model) as found:
        step()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert found.peak_bytes - weights == pytest.approx(allocated_bytes(step), rel=0.01)
    assert found.breakdown["weights"] == weights
    assert found.resident_bytes > found.peak_bytes


# Widths of the released models with two of their layers: every term is there, and the terms of layers are proportional.
WIDTHS = {
    size: Aquila2Config.preset(name, num_hidden_layers=2, max_position_embeddings=8192)
    for size, name in (("7B", "AquilaChat2-7B"), ("34B", "AquilaChat2-34B"), ("70B", "AquilaChat2-70B-Expr"))
}
SHAPES = {
    "default": {},
    "short": {"batch_size": 1, "seq_len": 512},
    "long": {"batch_size": 2, "seq_len": 8192},
    "kept": {"checkpointing": False, "seq_len": 1024},
    "plain": {"loss": "plain"},
    "upstream": {"recipe": "upstream"},
    "wide batch": {"batch_size": 32, "seq_len": 256},
    "r 64": {"r": 64, "targets": ("all-linear",)},
}
GRID = [(s, m, k) for s in WIDTHS for m in ("full", "lora", "qlora") for k in SHAPES if (m, k) != ("full", "r 64")]


@pytest.mark.parametrize(("size", "method", "shape"), GRID)
def test_the_closed_form_is_what_a_rehearsal_takes(size: str, method: str, shape: str):
    found = rehearse(WIDTHS[size], method, **SHAPES[shape])
    derived = formula_of(found.setting)
    assert derived.peak_bytes == pytest.approx(found.peak_bytes, rel=0.03), derived.moments
    assert derived.fits == found.fits


def test_there_are_settings_enough():
    assert len(REAL) >= 20
    assert len(GRID) >= 60


# --- the README of 2023 ----------------------------------------------------------------------------------------------


def test_the_rows_of_7b():
    lora, qlora = (rehearse(method=method, recipe="upstream") for method in ("lora", "qlora"))
    assert lora.peak_bytes / 1e9 == pytest.approx(29.4, rel=0.05)
    assert qlora.peak_bytes / 1e9 == pytest.approx(19.9, rel=0.05)
    assert (lora.peak_bytes - qlora.peak_bytes) / 1e9 == pytest.approx(29.4 - 19.9, rel=0.03)
    assert lora.possible_in(2.04)
    assert qlora.possible_in(2.14)
    for mine, theirs, share in ((rehearse(method="lora"), lora, 0.66), (rehearse(method="qlora"), qlora, 0.50)):
        assert mine.peak_bytes <= share * {"lora": 29.4e9, "qlora": 19.9e9}[mine.setting.method]
        assert mine.flops <= theirs.flops * 1.001
    assert rehearse(method="qlora", gpu="T4", precision="float16", weights="float16").reserved_bytes < 16e9


def test_all_parameters_of_7b_were_split_among_six_cards_or_so():
    total = {n: formula(method="full", recipe="upstream", gpus=n).peak_bytes / 1e9 for n in (2, 5, 6, 8)}
    assert total[6] == pytest.approx(43.9, rel=0.05)
    assert total[2] > 80
    assert total[8] < 43.9 < total[5]


def test_34b_with_four_rows_is_too_fast_and_too_small_to_be_true():
    model, upstream = "AquilaChat2-34B", {"method": "qlora", "seq_len": 4096, "recipe": "upstream"}
    printed = rehearse(model, batch_size=4, **upstream)
    assert not printed.possible_in(8.22)
    # Independent of any rehearsal: three products with every weight but the embedding's, at the card's peak.
    weights = printed.setting.config.parameter_count - 100008 * 6144
    assert 3 * 2 * weights * 4 * 4096 / GPUS["A100-80G"].flops > 8.22
    assert printed.peak_bytes > 1.3 * 37.7e9
    two = formula(model, batch_size=2, **upstream)
    assert two.peak_bytes / 1e9 == pytest.approx(37.7, rel=0.05)
    assert rehearse(model, "qlora", 1, 1024, "RTX 3090").reserved_bytes < GPUS["RTX 3090"].usable


# --- the parts -------------------------------------------------------------------------------------------------------


def test_operations_are_those_of_torchs_counter():
    wanted = setting(model=MODELS["narrow"], method="full", batch_size=2, seq_len=64)
    model = empty_model(wanted)
    furnish(model, lambda x: torch.randn(x.shape).mul_(0.02).to(x.dtype))
    batch = {"input_ids": torch.ones(2, 64, dtype=torch.long), "labels": torch.ones(2, 64, dtype=torch.long)}
    tracker = Tracker()  # without our formulas for attention, which torch's counter has not either
    with torch_products(), tracker:
        model(**batch).loss.backward()
    with torch_products(), FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    assert sum(work.flops for work in tracker.work) == counter.get_total_flops() > 0


def test_attention_is_counted_below_the_diagonal_only():
    found = [rehearse(WIDTHS["34B"], "lora", 1, length).flops for length in (2048, 4096)]
    # What grows with the square: products of T x T, two forward, two again, five backward, half of each.
    assert found[1] - 2 * found[0] == pytest.approx(9 * 2 * 48 * 128 * (4096**2 - 2 * 2048**2) / 2 * 2, rel=1e-3)


def test_the_allocator_cuts_and_joins():
    mib, a = 2**20, CachingAllocator()
    first = a.allocate(12 * mib)
    assert a.reserved == 12 * mib
    a.free(first)
    second = a.allocate(11 * mib)  # what would be left, 1 MiB, is too little to cut off
    assert second.size == 12 * mib
    a.free(second)
    a.allocate(6 * mib), a.allocate(6 * mib)
    assert a.reserved == 12 * mib  # both lie where one was
    a.allocate(3 * mib)
    assert a.reserved == 32 * mib  # below 10 MiB a segment has 20
    a.allocate(512)
    assert a.reserved == 34 * mib


def test_more_is_reserved_than_ever_used():
    tracker = tracked(setting(model=MODELS["narrow"], method="lora", batch_size=2, seq_len=64), "cpu")
    assert reserved_bytes(tracker.allocations, len(tracker.moments)) >= tracker.moments[tracker.peak].bytes


def test_sharing_leaves_its_share():
    one = formula(method="full", recipe="upstream", gpus=1, strategy="").terms
    for strategy, label in (("zero2", "optimizer"), ("zero3", "weights"), ("fsdp2", "weights")):
        terms = formula(method="full", recipe="upstream", gpus=8, strategy=strategy).terms
        assert terms[label] == pytest.approx(one[label] / 8, rel=1e-6)
        found = rehearse(WIDTHS["7B"], "full", recipe="upstream", gpus=8, strategy=strategy)
        assert formula_of(found.setting).peak_bytes == pytest.approx(found.peak_bytes, rel=0.03)


def test_the_trainer_is_measured(tmp_path):
    torch.manual_seed(0)
    model, ids = Aquila2ForCausalLM(MODELS["narrow"]), list(range(3, 35))
    callback = MemoryCallback(step=2)
    row = Row(np.array(ids, np.int32), np.array(ids, np.int32), np.ones(32, np.int32))
    rows = [row] * 8
    run = Run(steps=3, batch_size=2, precision="float32")
    args = arguments(run, tmp_path, disable_tqdm=True, save_strategy="no", report_to="none", use_cpu=True)
    trainer = Aquila2Trainer(model, args, rows, callbacks=[callback])
    trainer.train()
    trained = sum(parameter.numel() for parameter in model.parameters())
    alive = callback.found.breakdown
    assert alive["weights"] == 4 * trained
    assert alive["optimizer"] == pytest.approx(8 * trained, rel=0.01)
    assert callback.found.peak_bytes == sum(alive.values())


def test_what_stands_at_the_peak_has_its_own_name_and_line():
    """cuBLAS' workspace is no activation, and the gradient of the table comes from the line that looks words up."""
    found = rehearse("Aquila2-Nano", "full", batch_size=4, seq_len=256)
    assert {one.label for one in found.top if one.op == "cuBLAS"} == {"workspace"}
    tables = [one for one in found.top if "embedding_dense_backward" in one.op]
    assert tables and all(one.line.startswith("model/modeling.py") for one in tables)
    source = (Path(aquila2_tut.__file__).parent / "model" / "modeling.py").read_text().splitlines()
    assert "embed_tokens(" in source[int(tables[0].line.rpartition(":")[2]) - 1]


def test_on_cuda_the_allocator_is_asked(monkeypatch, tmp_path):
    """No GPU here: what torch.cuda is asked, in which order, and what becomes of the answers."""
    asked = []

    def answer(name, value=None):
        return lambda *args, **kwargs: asked.append((name, args, kwargs)) or value

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, answer(name))
    for name, value in (("max_memory_allocated", 7), ("max_memory_reserved", 8), ("mem_get_info", (30, 100))):
        monkeypatch.setattr(torch.cuda, name, answer(name, value))
    for name in ("_record_memory_history", "_dump_snapshot"):
        inspect.signature(getattr(torch.cuda.memory, name))  # they are there
        monkeypatch.setattr(torch.cuda.memory, name, answer(name))
    model = Aquila2ForCausalLM(MODELS["narrow"])
    with measure(model, snapshot=tmp_path / "step.pickle") as found:
        model(torch.ones(1, 4, dtype=torch.long))
    assert found.cuda == {"allocated": 7, "reserved": 8, "device": 70}
    names = [name for name, _, _ in asked]
    assert names.index("reset_peak_memory_stats") < names.index("_dump_snapshot") < names.index("max_memory_allocated")
    history = [kwargs for name, _, kwargs in asked if name == "_record_memory_history"]
    assert history == [{"max_entries": 100_000}, {"enabled": None}]


def test_a_snapshot_without_cuda_is_refused(tmp_path):
    with pytest.raises(RehearsalError, match="snapshot"), measure(nn.Linear(2, 2), snapshot=tmp_path / "step.pickle"):
        pass
    assert not list(tmp_path.iterdir())


def test_what_checkpointing_saves():
    with_, without = (rehearse(WIDTHS["7B"], "lora", checkpointing=on).breakdown for on in (True, False))
    saved = difference(without, with_)
    assert next(iter(saved)) == "activations"
    assert saved["weights"] == 0


def test_the_result_as_json():
    found = rehearse(WIDTHS["7B"], "qlora")
    told = json.loads(found.to_json())
    assert told["peak_bytes"] == sum(told["breakdown"].values()) == found.peak_bytes
    assert told["setting"]["method"] == "qlora"
    assert found.top[0].label == "weights"
    assert sum(a.bytes for a in found.top) <= found.allocated_bytes


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"seq_len": -1}, "seq_len"),
        ({"gpu": "A100"}, "did you mean A100"),
        ({"seq_len": 4096}, "context of AquilaChat2-7B holds 2048"),
        ({"method": "lora", "r": 5000}, "rank of 5000"),
        ({"method": "adapter"}, "method"),
        ({"model": "Aquila9"}, "no model named"),
        ({"model": MODELS["narrow"], "method": "lora", "r": 100}, "rank of 100"),
        ({"strategy": "zero2"}, "gpus is 1"),
        ({"gpus": 8, "strategy": "zero3"}, "four bits"),
        ({"dropout": 1.0}, "dropout"),
        ({"colour": 1}, "no such field"),
        ({"recipe": "best"}, "recipe"),
        ({"targets": ("w_proj",), "method": "lora"}, "w_proj"),
    ],
)
def test_a_setting_that_makes_no_sense_gets_one_line(wrong: dict, said: str):
    with pytest.raises(RehearsalError, match=said) as told:
        rehearse(**wrong)
    assert "\n" not in str(told.value)


# --- the commands ----------------------------------------------------------------------------------------------------


TOO_LARGE = ["--method", "lora", "--batch-size", "2", "--seq-len", "1024", "--gpu", "T4"]


def test_the_command_tells_what_to_change(capsys):
    assert main(["--lang", "zh", "rehearse", *TOO_LARGE, "--no-checkpointing"]) == 1
    told = capsys.readouterr().out
    assert "checkpointing = True" in told and "model.embed_tokens.weight" in told and "激活值" in told


def test_the_model_may_be_a_file_of_ones_own(tmp_path, capsys):
    MODELS["narrow"].save_pretrained(tmp_path)
    asked = ["rehearse", "--method", "full", "--batch-size", "2", "--seq-len", "64", "--json", "--model"]
    assert main([*asked, str(tmp_path)]) == main([*asked, str(tmp_path / "config.json")]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    wanted = rehearse(MODELS["narrow"], "full", batch_size=2, seq_len=64)
    assert first["peak_bytes"] == second["peak_bytes"] == wanted.peak_bytes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("{", "not valid JSON"),
        ("[]", "config.json"),
        ('{"hidden_size": 100, "num_attention_heads": 3}', "num_attention_heads"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line(text: str | None, said: str, tmp_path, capsys):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert main(["rehearse", "--model", str(tmp_path / "config.json")]) == 2
    told = capsys.readouterr().err
    assert said in told and "config.json" in told and told.count("\n") == 1


def test_each_saving_is_rehearsed(capsys):
    assert main(["rehearse", *TOO_LARGE, "--loss", "plain", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"] and found["changes"][-1]["fits"]
    after = [change["peak_bytes"] for change in found["changes"]]
    before = [found["peak_bytes"], *after]
    assert [change["saved"] for change in found["changes"]] == [a - b for a, b in zip(before, after, strict=False)]


def test_a_wrong_setting_is_one_line(capsys):
    assert main(["rehearse", "--batch-size", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_plan_of_a_small_card(capsys):
    assert main(["plan", "--gpu", "T4", "--json"]) == 0
    fitting = json.loads(capsys.readouterr().out)
    assert {"lora", "qlora"} <= {one["method"] for one in fitting if one["model"] == "AquilaChat2-7B"}
    assert all(one["bytes"] <= GPUS["T4"].usable and one["precision"] == "float16" for one in fitting)
    assert not any(one["model"] == "AquilaChat2-34B" for one in fitting)
    assert main(["plan", "--gpu", "T4"]) == 0
    assert "8 x 2048" in capsys.readouterr().out
