"""A fine-tuning run in a process of its own, which tells what it is about to do, for tests that kill it there."""

import random
from functools import wraps
from multiprocessing.connection import Connection
from pathlib import Path

from tuning_runs import run

WATCHED = {"training_step": "step", "_save_checkpoint": "save", "evaluation_loop": "evaluation"}
# What a run must take up when it goes on, and what of Trainer's brings it back.
TAKEN_UP = {"dice": "_load_rng_state", "optimizer": "_load_optimizer_and_scheduler"}


def watched_run(base: Path, data: Path, folder: Path, changes: dict, pipe: Connection, without: str = "") -> None:
    """A run with dice of its own, as in a process that has been started by hand.

    Args:
        base, data, folder, changes: of the run.
        pipe: gets a word before each thing of `WATCHED`.
        without: what is not taken up when the run goes on: "dice", "optimizer", "order" or nothing.
    """
    import numpy
    import torch

    from aquila2_tut.train import tuner, tuning

    pipe.send("begin")
    # A forked process has its parent's dice, and would agree with its siblings by chance.
    for throw in (random.seed, numpy.random.seed, torch.seed):
        throw()
    for method, word in WATCHED.items():
        setattr(tuner.Tuner, method, _told(getattr(tuner.Tuner, method), word, pipe))
    if without in TAKEN_UP:
        setattr(tuner.Tuner, TAKEN_UP[without], lambda *_: None)
    if without == "order":
        plain = tuning.arguments
        tuning.arguments = lambda *given, **named: plain(*given, **named, ignore_data_skip=True)
    run(base, data, folder, changes)


def _told(method, word, pipe):
    @wraps(method)
    def telling(*arguments, **options):
        pipe.send(word)
        return method(*arguments, **options)

    return telling
