"""`aquila2-tut finetune` and `merge` in the hands of people who mistype: one line that says what to do."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tuning_runs import PLAIN, some_base, some_conversations

from aquila2_tut import cli

ROOT = Path(__file__).resolve().parent.parent
GOOD = b'{"id": "1", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n'


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return some_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def files(base, tmp_path):
    """A recipe and data that are good."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({**PLAIN, "base": str(base), "steps": 2}))
    return recipe, some_conversations(tmp_path / "data.jsonl")


@pytest.fixture
def refused(capsys):
    """What a command says that fails, in one line."""

    def command(*argv):
        capsys.readouterr()
        assert cli.main([str(word) for word in argv]) == cli.FAILED
        told = capsys.readouterr()
        lines = told.err.strip().splitlines()
        assert told.out == "" and len(lines) == 1 and lines[0].startswith("aquila2-tut: "), told
        return lines[0]

    return command


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("=1", "--set =1: key=value is needed"),
        ("", "key=value is needed"),
        ("steps", "key=value is needed"),
        ("steps=", "steps must be of type int"),
        ("steps=two", "steps must be of type int"),
        ("steps=-1", "steps: must be 0 or above"),
        ("steps=1.5", "steps must be of type int"),
        ("steps=[", "is no value of a recipe"),
        ("steps=!!python/object:os.system x", "is no value of a recipe"),
        ("learning_rate=nan", "learning_rate: must be above 0, not nan"),
        ("learning_rate=.inf", "learning_rate: must be"),
        ("epochs=.inf", "epochs: must be"),
        ("betas=3", "betas must be of type tuple"),
        ("betas=[0.9]", "betas: two numbers"),
        ("betas=[0.9, 2]", "betas: two numbers"),
        ("betas=[a, b]", "betas: two numbers"),
        ("targets=[1]", "targets: a list of words"),
        ("ask=hello", "ask must be of type tuple"),
        ("seed=-5", "seed: must be"),
        ("template=nonsense", "nonsense"),
        ("nonsense=1", "there is no field 'nonsense'"),
        ("a.b=1", "there is no field 'a.b'"),
        ("seed=-1", "seed: must be"),
        ("base=nobody", "nobody"),
        ("r=0", "r: must be above 0"),
    ],
)
def test_settings(files, tmp_path, refused, setting, message):
    recipe, data = files
    told = refused("finetune", "--recipe", recipe, "--data", data, "--out", tmp_path / "run", "--set", setting)
    assert message in told and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (GOOD + b'{"id": "2", "conv\n' + GOOD, ":2"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), "data"),
        (b"\0" * 100, "data"),
        (b"[]", "empty"),
        (None, "is a folder"),
    ],
)
def test_data(files, tmp_path, refused, content, message):
    data = tmp_path / "other.jsonl"
    data.mkdir() if content is None else data.write_bytes(content)
    told = refused("finetune", "--recipe", files[0], "--data", data, "--out", tmp_path / "run")
    assert message in told and str(data) in told and not (tmp_path / "run").exists()


def test_an_empty_archive(files, tmp_path, refused):
    data = tmp_path / "data.jsonl.gz"
    data.write_bytes(b"")
    assert str(data) in refused("finetune", "--recipe", files[0], "--data", data, "--out", tmp_path / "run")


def test_a_byte_order_mark_is_no_fault(files, tmp_path, capsys):
    data = tmp_path / "bom.jsonl"
    data.write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert cli.main(["finetune", "--recipe", str(files[0]), "--data", str(data), "--dry-run"]) == 0
    assert "1 conversations" in capsys.readouterr().out


def test_a_share_that_leaves_nothing(files, tmp_path, refused):
    data = tmp_path / "one.jsonl"
    data.write_bytes(GOOD)
    options = ("--data", data, "--out", tmp_path / "run", "--set", "eval_share=0.5")
    assert "eval_share" in refused("finetune", "--recipe", files[0], *options)


@pytest.mark.parametrize(
    "content", [b"", b"- a\n", b"steps: [\n", b"\xff\xfe", b"1: 2\n", b"steps: 1\nsteps: 2\n", None]
)
def test_recipes(files, tmp_path, refused, content):
    recipe = tmp_path / "bad.yaml"
    recipe.mkdir() if content is None else recipe.write_bytes(content)
    told = refused("finetune", "--recipe", recipe, "--data", files[1], "--out", tmp_path / "run")
    assert "bad.yaml" in told and not (tmp_path / "run").exists()


def test_places_for_a_run(files, tmp_path, refused):
    recipe, data = files
    file = tmp_path / "file"
    file.write_text("x")
    closed = tmp_path / "closed"
    (closed / "recipe.json.new").mkdir(parents=True)  # also root cannot write that file
    for place in (file, file / "below", "/proc/run", closed):
        told = refused("finetune", "--recipe", recipe, "--data", data, "--out", place)
        assert str(place) in told
    other = tmp_path / "other"
    other.mkdir()
    (other / "recipe.json").write_text("{")
    assert "recipe.json" in refused("finetune", "--recipe", recipe, "--data", data, "--out", other)


def test_merge(files, base, tmp_path, refused, capsys):
    recipe, data = files
    assert cli.main(["finetune", "--recipe", str(recipe), "--data", str(data), "--out", str(tmp_path / "run")]) == 0
    adapter, merged = tmp_path / "run" / "adapter", tmp_path / "merged"
    assert cli.main(["merge", str(base), str(adapter), "--out", str(merged)]) == 0
    assert "is there already" in refused("merge", base, adapter, "--out", merged)
    assert "is an adapter for" in refused("merge", merged, adapter, "--out", tmp_path / "twice")
    other = some_base(tmp_path / "other")
    assert "is an adapter for" in refused("merge", other, adapter, "--out", tmp_path / "new")
    assert "no adapter" in refused("merge", base, tmp_path / "run", "--out", tmp_path / "new")
    assert str(data) in refused("merge", base, adapter, "--out", data / "below")
    (adapter / "adapter_model.safetensors").write_bytes(b"damaged")
    assert "damaged" in refused("merge", base, adapter, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(files, tmp_path):
    recipe, data = files
    argv = ["finetune", "--recipe", str(recipe), "--data", str(data), "--out", str(tmp_path / "run")]
    argv += ["--set", "steps=4000", "save_every=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LANG": "zh_CN.UTF-8", "LC_ALL": "", "LC_MESSAGES": ""}
    command = [sys.executable, "-m", "aquila2_tut.cli", *argv]
    options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # A test run that was put into the background hands down "ignore Ctrl-C" to all its children.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, env=environment, preexec_fn=heard, **options)
    while process.poll() is None and not list((tmp_path / "run").glob("checkpoint-*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == cli.INTERRUPTED and "Traceback" not in told
    assert "已中断" in told.splitlines()[-1] and "checkpoint-" in told.splitlines()[-1]
