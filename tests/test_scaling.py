"""Several processes: weights that are split, runs that go on in another number of processes, ranks that die.

Everything here runs on CPUs with gloo. The reference is the same run in one process.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tuning_runs import (
    PLAIN,
    free_port,
    run_noted,
    small_tuning,
    some_base,
    some_conversations,
    torchrun,
)

from aquila2_tut import Aquila2Config, AutoLoader
from aquila2_tut.train import TrainError, Tuning, finetune
from aquila2_tut.train.checkpoints import checkpoints
from aquila2_tut.train.tuning import tuning_arguments

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("tuning_runs.py")
FIELDS = {"learning_rate": 1e-3, "clip": 0.5}
ONE, TWO = {"batch_size": 4, "sharding": ""}, {"batch_size": 2, "sharding": "fsdp2"}
METHODS = ["full", "lora"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return some_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return some_conversations(tmp_path_factory.mktemp("data") / "data.jsonl")


def in_two(base, data, folder, changes, **more):
    given = {"base": str(base), "data": str(data), "folder": str(folder), "changes": {**FIELDS, **TWO, **changes}}
    return torchrun(2, str(WORKER), json.dumps({**given, **more}))


@pytest.fixture(scope="module")
def ended(base, data, tmp_path_factory):
    """Folders of the same run in one process and in two, for each method."""
    folders = {}
    for method in METHODS:
        one, two = (tmp_path_factory.mktemp(f"{method}-{name}") / "run" for name in ("one", "two"))
        finetune(small_tuning(base, data, **FIELDS, **ONE, method=method), one, AutoLoader)
        done = in_two(base, data, two, {"method": method})
        assert done.returncode == 0, done.stderr[-3000:]
        folders[method] = (one, two)
    return folders


def result(folder):
    return next(folder / name for name in ("model", "adapter") if (folder / name).is_dir())


def losses(folder):
    log = json.loads((result(folder) / "log.json").read_text())
    return [entry["loss"] for entry in log if "loss" in entry]


def weights(folder):
    return load_file(next(result(folder).glob("*.safetensors")))


def assert_same(one, other):
    assert losses(other) == pytest.approx(losses(one), abs=1e-4) and len(losses(one)) == PLAIN["steps"]
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-5)


# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_each_process_holds_half_and_learns_what_one_alone_does(ended, method):
    one, two = ended[method]
    assert_same(one, two)
    notes = [json.loads((two / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for note in notes:
        assert note["split"] == 1.0
        held, all_of_them = note["weights"]
        assert held == pytest.approx(all_of_them / 2, rel=0.01)
    # AdamW keeps two numbers for each weight that learns; a step count a tensor comes on top.
    learned = sum(tensor.numel() for tensor in weights(two).values())
    assert sum(note["states"] for note in notes) == pytest.approx(2 * 4 * learned, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_what_two_processes_leave_loads_and_answers_as_that_of_one(ended, base, method):
    answers = []
    for folder in ended[method]:
        place = {"model_name": str(result(folder))} if method == "full" else {"lora_dir": result(folder)}
        loader = AutoLoader("aquila2", **{"model_name": str(base), "torch_dtype": "float32", **place})
        model, tokenizer = loader.get_model(), loader.get_tokenizer()
        options = {"tokenizer": tokenizer, "temperature": 0, "max_gen_len": 8, "convo_template": "aquila-v1"}
        answers.append(model.predict("red green", **options))
    assert answers[0] == answers[1] != ""


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_in_another_number_of_processes(ended, base, data, tmp_path, method):
    """In both directions: the second half of the steps is not run where the first half was."""
    one, two = ended[method]
    for source, name in ((two, "alone"), (one, "together")):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        shutil.rmtree(result(folder))
        for late in checkpoints(folder)[1:]:
            shutil.rmtree(late)
        for note in folder.glob("rank-*.json"):
            note.unlink()
    finetune(small_tuning(base, data, **FIELDS, **ONE, method=method), tmp_path / "alone", AutoLoader)
    done = in_two(base, data, tmp_path / "together", {"method": method})
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "together").glob("rank-*.json"))) == 2
    for name in ("alone", "together"):
        assert_same(one, tmp_path / name)


def test_the_best_checkpoint_of_shards_is_taken(base, data, tmp_path):
    """With a rate at which the held-out loss does not always fall."""
    changes = {"eval_share": 0.2, "eval_every": 2, "patience": 1, "learning_rate": 0.3, "method": "full"}
    done = in_two(base, data, tmp_path / "run", changes)
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((tmp_path / "run" / "model" / "log.json").read_text())
    held_out = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    best = 2 * (1 + held_out.index(min(held_out)))
    assert best < max(entry["step"] for entry in log)
    kept, taken = (
        load_file(tmp_path / "run" / place / "model.safetensors") for place in (f"checkpoint-{best}", "model")
    )
    assert all(torch.equal(taken[name], tensor) for name, tensor in kept.items()) and kept.keys() == taken.keys()


def test_fsdp2_in_one_process_is_an_ordinary_run(base, data, tmp_path, ended):
    run_noted(base, data, tmp_path / "run", {**FIELDS, "batch_size": 4, "sharding": "fsdp2", "method": "lora"})
    assert json.loads((tmp_path / "run" / "rank-0.json").read_text())["split"] == 0
    assert_same(ended["lora"][0], tmp_path / "run")


def test_another_number_of_rows_a_step_is_another_run(base, data, tmp_path, ended):
    folder = tmp_path / "run"
    shutil.copytree(ended["lora"][1], folder)
    with pytest.raises(TrainError, match="holds a run with rows_a_step=4, not 2"):
        finetune(small_tuning(base, data, **FIELDS, batch_size=2, method="lora"), folder, AutoLoader)


def test_what_cannot_be_split_is_refused(base, data, tmp_path):
    with pytest.raises(TrainError, match="optimizer: adamw-8bit is bitsandbytes'"):
        finetune(small_tuning(base, data, sharding="fsdp2", optimizer="adamw-8bit"), tmp_path, AutoLoader)
    with pytest.raises(TrainError, match="also_train: .* shares its embedding with its head"):
        finetune(small_tuning(base, data, sharding="fsdp2", also_train=("embed_tokens",)), tmp_path, AutoLoader)


# --- ranks that die, err or speak ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharding", ["", "fsdp2"])
def test_a_killed_rank_ends_all_and_the_run_given_again_goes_on(base, data, tmp_path, ended, sharding):
    folder = tmp_path / "run"
    given = {"base": str(base), "data": str(data), "folder": str(folder), "dies_at": 3}
    given["changes"] = {**FIELDS, **TWO, "method": "lora", "sharding": sharding}
    done = torchrun(2, str(WORKER), json.dumps(given), timeout=120)
    assert done.returncode == 1 and "exitcode  : -9" in done.stderr and "Signal 9 (SIGKILL)" in done.stderr
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"] and not (folder / "adapter").exists()
    again = torchrun(2, str(WORKER), json.dumps({**given, "dies_at": 0}))
    assert again.returncode == 0, again.stderr[-3000:]
    assert_same(ended["lora"][0], folder)


def command(base, data, folder, *changes):
    recipe = folder / "mine.yaml"
    recipe.write_text(yaml.safe_dump({**PLAIN, **FIELDS, "base": str(base), "batch_size": 2}))
    argv = ["-m", "aquila2_tut.cli", "finetune", "--recipe", str(recipe), "--data", str(data)]
    return [*argv, "--out", str(folder / "run"), *(["--set", *changes] if changes else [])]


def test_an_error_that_all_find_is_told_once(base, tmp_path):
    data = tmp_path / "wrong.jsonl"
    data.write_text('{"id": "1", "conversations": [{"from": "human"}]}\n')
    done = torchrun(2, *command(base, data, tmp_path))
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("aquila2-tut: ")]
    assert len(told) == 1 and "wrong.jsonl:1: error" in told[0]
    ours = done.stderr.partition("torch/distributed/elastic")[0]
    assert "Traceback" not in ours


def test_what_rank_0_says_is_printed_once(base, data, tmp_path):
    """Upstream's rank0_print said nothing at all: train() set a local variable that nobody read."""
    done = torchrun(2, *command(base, data, tmp_path, "steps=2"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("The first batch") == 1 and done.stderr.count("<|startofpiece|>") == 2
    assert done.stdout.splitlines()[-1] == str(
        tmp_path / "run" / "adapter"
    )  # DeepSpeed speaks there too, if it is there


# --- several machines ------------------------------------------------------------------------------------------------


def test_a_hostfile_of_two_machines(tmp_path):
    """The ssh of this test runs the command here, so that both machines of the file are this one."""
    ssh, hosts, asked = tmp_path / "bin" / "ssh", tmp_path / "hosts", tmp_path / "asked"
    ssh.parent.mkdir()
    ssh.write_text(f'#!/usr/bin/env bash\necho "$1" >>"{asked}"\nexec bash -c "$2"\n')
    ssh.chmod(0o755)
    hosts.write_text("# two machines\n127.0.0.1 slots=1\nlocalhost slots=1\n")
    settings = {
        "PATH": f"{ssh.parent}{os.pathsep}{os.environ['PATH']}",
        "HOSTFILE": str(hosts),
        "MASTER_PORT": free_port(),
        "RECIPE": "nano-lora",
        "SHARDING": "fsdp2",
        "CKPT_OUTPUT": str(tmp_path / "out put"),  # ssh's command line is read by a shell again
        "EXPNAME": "x",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    changes = ["steps=2", "length=64", "batch_size=1", "ask=[]", "eval_share=0", "eval_every=0", "save_every=2"]
    script = ["bash", str(ROOT / "finetune" / "7B" / "finetune_lora.sh"), "--set", *changes]
    options = {"capture_output": True, "text": True, "check": False, "timeout": 200, "cwd": tmp_path}
    done = subprocess.run(script, env={**os.environ, **settings}, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(asked.read_text().split()) == ["127.0.0.1", "localhost"]
    folder = tmp_path / "out put" / "nano-lora-x"
    assert done.stdout.splitlines()[-1] == str(folder / "adapter") and weights(folder)
    assert json.loads((folder / "recipe.json").read_text())["rows_a_step"] == 2
    assert len(list((folder / "checkpoint-2").glob("rng_state_?.pth"))) == 2


# --- DeepSpeed -------------------------------------------------------------------------------------------------------

WITHOUT = "DeepSpeed is not installed (on a machine without nvcc: DS_BUILD_OPS=0 pip install deepspeed)"


@pytest.mark.parametrize(("sharding", "stage"), [("zero2", 2), ("zero3", 3)])
def test_deepspeed_understands_the_shipped_files(tmp_path, monkeypatch, sharding, stage):
    """Its own reader, with the fields that transformers fills in."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed", reason=WITHOUT)
    from deepspeed.runtime.config import DeepSpeedConfig

    for name in ("ACCELERATE_USE_DEEPSPEED", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.setenv(name, "")  # the arguments set them for the whole process; this puts them back
    recipe = Tuning(data="x", sharding=sharding, batch_size=4, accumulation=2, clip=0.5)
    arguments = tuning_arguments(recipe, tmp_path)
    config = arguments.hf_deepspeed_config
    model = SimpleNamespace(config=Aquila2Config.preset("Aquila2-7B"))
    config.trainer_config_finalize(arguments, model, 100)
    assert "auto" not in json.dumps(config.config)
    read = DeepSpeedConfig(config.config)
    assert read.zero_config.stage == stage and read.bfloat16_config.enabled and read.gradient_clipping == 0.5
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu) == (8, 4)


@pytest.mark.parametrize(("sharding", "method"), [("zero2", "full"), ("zero2", "lora"), ("zero3", "full")])
def test_deepspeed_in_two_processes_learns_what_one_alone_does(
    base, data, tmp_path, ended, monkeypatch, sharding, method
):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed", reason=WITHOUT)
    done = in_two(base, data, tmp_path / "run", {"method": method, "sharding": sharding})
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(ended[method][0], tmp_path / "run")
