"""Runs that are killed at ten moments of chance, and end with the bits of one that nobody disturbed."""

import contextlib
import multiprocessing
import random
import signal
import time

import pytest
from tuning_watch import watched_run

from aquila2_tut.train.checkpoints import UNFINISHED, checkpoints

CHANGES = {"dropout": 0.1, "steps": 22, "save_every": 1, "keep": 2, "eval_share": 0.1, "eval_every": 2}
KILLS = ["begin", *["step"] * 3, *["save"] * 3, *["evaluation"] * 3]


@pytest.fixture(scope="module")
def forks():
    """Processes from a server that has imported all and run nothing; each has dice of its own, see `watched_run`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["aquila2_tut.train.plan", "aquila2_tut.loader", "peft", "tuning_watch"])
    return context


def start(context, *arguments):
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=watched_run, args=(*arguments[:4], theirs, *arguments[4:]))
    process.start()
    theirs.close()
    return process, ours


def complete(context, *arguments):
    process, pipe = start(context, *arguments)
    while process.is_alive():
        heard(pipe)
    assert process.exitcode == 0


def heard(pipe):
    """The next word of a run; None if there is none for a while, or if it has ended."""
    try:
        return pipe.recv() if pipe.poll(0.1) else None
    except EOFError:
        time.sleep(0.01)
        return None


def killed(context, moment, *arguments):
    """A run that is killed some seconds after it has begun a thing for the n-th time, or when it begins the next."""
    what, times, seconds = moment
    process, pipe = start(context, *arguments)
    while times and process.is_alive():
        times -= heard(pipe) == what
    with contextlib.suppress(EOFError):
        pipe.poll(seconds)
    process.kill()
    process.join()
    return process.exitcode


def moments(dice):
    """Ten moments, each counted from where the run goes on. Together they are at most 21 of its steps."""
    most = {"begin": (1, 0.8), "step": (2, 0.03), "save": (2, 0.03), "evaluation": (1, 0.03)}
    return [(kind, dice.randint(1, most[kind][0]), dice.uniform(0, most[kind][1])) for kind in dice.sample(KILLS, 10)]


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_killed_ten_times_a_run_ends_with_the_same_bits(base, data, tmp_path, forks, method):
    """The undisturbed run is a fresh interpreter, in which also the order of sets is another."""
    run = (base, data, tmp_path / "killed", {**CHANGES, "method": method})
    for moment in moments(random.SystemRandom()):
        code = killed(forks, moment, *run)
        left = [path.name for path in [*checkpoints(run[2]), *run[2].glob(UNFINISHED + "*")]]
        print("killed at", moment, "; what there is:", *left)  # shown where the test fails
        assert code == -signal.SIGKILL
    assert not (run[2] / "adapter").exists()
    complete(forks, *run)
    complete(multiprocessing.get_context("spawn"), base, data, tmp_path / "whole", run[3])
    assert adapter(run[2]) == adapter(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("without", ["", "dice", "optimizer", "order"])
def test_what_is_not_taken_up_is_noticed(base, data, tmp_path, forks, without):
    changes = {**CHANGES, "steps": 8, "method": "lora"}
    complete(forks, base, data, tmp_path / "whole", changes)
    assert killed(forks, ("save", 3, 0.0), base, data, tmp_path / "killed", changes) == -signal.SIGKILL
    assert checkpoints(tmp_path / "killed")
    complete(forks, base, data, tmp_path / "killed", changes, without)
    assert (adapter(tmp_path / "killed") == adapter(tmp_path / "whole")) == (not without)
