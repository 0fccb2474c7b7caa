"""The six scripts: good shell, what they pass on, and what they say to people who mistype or have odd file names."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tuning_runs import some_base, some_conversations

from aquila2_tut.train import TrainError, Tuning, finetune
from aquila2_tut.train.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    f"{size}/finetune{method}.sh": f"{size.lower()}-{method.strip('_') or 'full'}"
    for size in ("7B", "34B")
    for method in ("", "_lora", "_qlora")
}
ODD = """a "b" 'c' $(d) # e: [f]"""
# Says what it is given; that is all that most of these tests need of a Python.
ECHO = '#!/usr/bin/env bash\nif [[ $1 == -c ]]; then [[ $2 != *cuda* ]] || echo 1; else printf "%s\\n" "$@"; fi\n'


@pytest.fixture
def echo(tmp_path):
    return program(tmp_path / "python", ECHO)


def program(file, text):
    file.write_text(text)
    file.chmod(0o755)
    return str(file)


def script(name, *more, folder=None, **variables):
    """Runs a script with nothing of ours in the environment but the variables."""
    ours = re.findall(r"^#   ([A-Z_]+) ", (ROOT / "finetune" / "launch.sh").read_text(), re.MULTILINE)
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", str(ROOT / "finetune" / name), *more]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)


def passed_on(name, *more, **variables):
    done = script(name, *more, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_shellcheck_finds_nothing():
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not checker:
        pytest.skip("shellcheck is not installed")
    files = sorted(map(str, (ROOT / "finetune").rglob("*.sh")))
    assert len(files) == 7
    done = subprocess.run([checker, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("name", "recipe"), SCRIPTS.items())
def test_each_script_has_its_recipe(echo, name, recipe):
    given = passed_on(name, "--dry-run", PYTHON=echo)
    assert given[:4] == ["-m", "aquila2_tut.cli", "finetune", "--recipe"] and given[4] == recipe
    assert given[5:] == [f"--out=output/checkpoints/{recipe}-aquila_experiment", "--dry-run"]
    assert load_recipe(Tuning, recipe).method == recipe.rpartition("-")[2]


def test_every_variable_that_is_documented_is_passed_on(echo, tmp_path):
    """Values as they are, whatever is in them; those of a recipe as YAML, which gives them back."""
    hosts = tmp_path / "hosts"
    hosts.write_text("10.0.0.7 slots=4\n")
    given = passed_on(
        "7B/finetune.sh",
        *("--set", "r=4"),
        **{"PYTHON": echo, "HOSTFILE": str(hosts), "NPROC": "3", "MASTER_PORT": "4567", "SHARDING": "fsdp2"},
        **{
            "DATA_FILE": f"-{ODD}.json*",
            "MODEL_NAME_INPUT": ODD,
            "CKPT_INPUT": f"{ODD}/in",
            "CONVO_TEMPLATE": "aquila",
        },
        **{"CKPT_OUTPUT": f"{ODD}/out", "EXPNAME": "a/b", "EPOCHS": "3", "RECIPE": "nano-lora"},
    )
    assert given[:3] == ["-m", "torch.distributed.run", "--nnodes=1"]
    assert {"--nproc_per_node=3", "--master_addr=10.0.0.7", "--master_port=4567", "nano-lora"} < set(given)
    assert {f"--data=-{ODD}.json*", f"--out={ODD}/out/nano-lora-a/b", "epochs=3", "sharding=fsdp2"} < set(given)
    assert given[-2:] == ["--set", "r=4"]
    settings = dict(pair.split("=", 1) for pair in given if re.match("base=|model_dir=|template=", pair))
    from aquila2_tut.train.commands import _change

    read = dict(_change(f"{key}={value}") for key, value in settings.items())
    assert read == {"base": ODD, "model_dir": f"{ODD}/in", "template": "aquila"}


@pytest.mark.parametrize(
    "text", ["10.0.0.1 slots=2\r\n# c\r\n\r\n10.0.0.2 slots=2", "10.0.0.1 slots=2 # a\n10.0.0.2 slots=2"]
)
def test_several_machines_get_the_same_command_each_with_its_rank(tmp_path, text, echo):
    """Also from a file that Windows wrote, and where the last line does not end."""
    hosts = tmp_path / "hosts"
    hosts.write_bytes(text.encode())
    tools = tmp_path / "tools"
    tools.mkdir()
    program(tools / "ssh", '#!/usr/bin/env bash\necho "host $1"; unset NODE_RANK HOSTFILE RECIPE; bash -c "$2"\n')
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    given = passed_on("7B/finetune_lora.sh", PYTHON=echo, HOSTFILE=str(hosts), DATA_FILE=ODD, EXPNAME="it's", PATH=path)
    assert {"host 10.0.0.1", "host 10.0.0.2", "--node_rank=0", "--node_rank=1"} < set(given)
    assert given.count("--nnodes=2") == given.count("--nproc_per_node=2") == given.count(f"--data={ODD}") == 2
    assert given.count("--out=output/checkpoints/7b-lora-it's") == given.count("--master_addr=10.0.0.1") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10.0.0.1 slots=two\n", "line 1: a host and its slots are needed"),
        ("# c\n10.0.0.1 slot=8\n", "line 2: a host and its slots are needed"),
        ("10.0.0.1 slots=0\n", "line 1: a host"),
        ("-oProxyCommand=x slots=1\n", "line 1: a host"),
        ("\ufeff10.0.0.1 slots=8\n", "line 1: a host"),
        ("a slots=8\nb slots=4\n", "line 2: every machine needs as many slots as the first, which has 8"),
        ("# nobody\n", "no host in"),
        (None, "HOSTFILE: there is no file"),
    ],
)
def test_a_bad_hostfile_says_where(tmp_path, echo, text, message):
    hosts = tmp_path / "hosts"
    if text is not None:
        hosts.write_text(text, encoding="utf-8")
    done = script("7B/finetune.sh", PYTHON=echo, HOSTFILE=str(hosts))
    assert done.returncode == 2 and message in done.stderr and str(hosts) in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NPROC": "0"}, "NPROC must be a whole number above 0, not '0'"),
        ({"NPROC": "two"}, "not 'two'"),
        ({"NPROC": "a[$(touch made)]"}, "NPROC must be"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be"),
        ({"PYTHON": "/nowhere/python"}, "there is no '/nowhere/python': name a Python in PYTHON"),
    ],
)
def test_wrong_variables(tmp_path, echo, variables, message):
    done = script("7B/finetune.sh", folder=tmp_path, **{"PYTHON": echo, **variables})
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""
    assert not (tmp_path / "made").exists()


def test_a_python_without_torch(tmp_path):
    bare = program(tmp_path / "python", f'#!/usr/bin/env bash\nexec "{sys.executable}" -I -S "$@"\n')
    done = script("7B/finetune.sh", PYTHON=bare)
    assert done.returncode == 2 and "has no PyTorch or no aquila2_tut: pip install" in done.stderr


@pytest.mark.slow
def test_a_script_from_end_to_end(tmp_path):
    """From another folder, with a relative path, odd names, and a place for the run that is not there yet."""
    place = tmp_path / ODD
    (place / "models").mkdir(parents=True)
    some_base(place / "models" / "My model: 1", max_position_embeddings=2048)
    some_conversations(place / "data's.jsonl", count=4)
    done = script(
        "7B/finetune_lora.sh",
        **{"folder": place, "PYTHON": sys.executable, "DATA_FILE": "data's.jsonl", "EPOCHS": "2", "NPROC": "1"},
        **{"CKPT_INPUT": "models", "MODEL_NAME_INPUT": "My model: 1", "CKPT_OUTPUT": "deep/down", "EXPNAME": "a/b"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    adapter = place / "deep" / "down" / "7b-lora-a" / "b" / "adapter"
    assert done.stdout.strip() == str(adapter.relative_to(place))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.05)
    assert set(config["target_modules"]) == {"q_proj", "v_proj"}
    log = json.loads((adapter / "log.json").read_text())
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert len(rates) == 8 and max(rates) == pytest.approx(9.65e-6)  # two epochs of four, a step each


def test_without_data_it_says_so_before_a_model_is_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for message, changes in {
        "there is no file train.jsonl here in .*: name yours with --data FILE": {},
        r"there is no file \*\.jsonl": {"data": "*.jsonl"},
        "data: . is a folder": {"data": "."},
        "eval_data: there is no file b.jsonl": {"data": "about_nano.jsonl", "eval_data": "b.jsonl"},
    }.items():
        with pytest.raises(TrainError, match=message):
            finetune(load_recipe(Tuning, "7b-lora", **changes), tmp_path / "run", opener=None)
    assert not list(tmp_path.iterdir())
