"""The sweep goes on where it was stopped, and sums up what it has."""

import argparse
import json
import statistics
from pathlib import Path

import pytest

pytest.importorskip("peft")


@pytest.fixture
def sweep(monkeypatch):
    """The benchmark as a module, with runs that take no time."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import lora_sweep

    lora_sweep.asked = []

    def some_run(job):
        lora_sweep.asked.append(job)
        maps, r, bits, seed, steps = job
        place = {"maps": maps, "r": r, "bits": bits, "seed": seed, "steps": steps, "trained": 1000 * r}
        return {**place, "loss": 1 / r + seed / 100, "right": 0.0, "seconds": 0.1, "peak": 10**9, "beyond": 10**8}

    monkeypatch.setattr(lora_sweep, "in_a_process", some_run)
    return lora_sweep


def options(tmp_path, **changes):
    given = {"runs": tmp_path / "runs.jsonl", "seeds": [1, 2], "steps": 5, "minutes": 1.0}
    return argparse.Namespace(**{**given, **changes})


def test_a_finished_run_is_not_done_again(sweep, tmp_path):
    first = sweep.sweep(options(tmp_path, seeds=[1]))
    assert len(sweep.asked) == len(first) == len(sweep.GRID)
    both = sweep.sweep(options(tmp_path))
    assert [job[3] for job in sweep.asked[len(first) :]] == [2] * len(sweep.GRID)
    assert both[: len(first)] == first


def test_a_line_that_was_cut_is_done_again(sweep, tmp_path):
    sweep.sweep(options(tmp_path, seeds=[1]))
    file = tmp_path / "runs.jsonl"
    file.write_text(file.read_text()[:-20])
    sweep.sweep(options(tmp_path, seeds=[1]))
    assert sweep.asked[-1] == sweep.asked[len(sweep.GRID) - 1]
    assert len(sweep.asked) == len(sweep.GRID) + 1
    assert len(sweep.read_runs(file)) == len(sweep.GRID)


def test_runs_of_other_steps_are_other_runs(sweep, tmp_path):
    sweep.sweep(options(tmp_path, seeds=[1]))
    sweep.sweep(options(tmp_path, seeds=[1], steps=6))
    assert len(sweep.asked) == 2 * len(sweep.GRID)


def test_no_run_begins_after_the_time_is_up(sweep, tmp_path):
    assert sweep.sweep(options(tmp_path, minutes=0.0)) == []
    assert sweep.asked == []


def test_seeds_take_turns_and_are_summed_up(sweep, tmp_path):
    runs = sweep.sweep(options(tmp_path))
    assert [run["seed"] for run in runs] == [1] * len(sweep.GRID) + [2] * len(sweep.GRID)
    table = sweep.rows(runs)
    assert [(row["maps"], row["r"], row["bits"]) for row in table] == sweep.GRID
    for row in table:
        losses = [1 / row["r"] + seed / 100 for seed in (1, 2)]
        assert row["loss"]["value"] == pytest.approx(statistics.mean(losses), abs=1e-4)
        half = 12.7062 * statistics.stdev(losses) / 2**0.5  # of Student's t with one degree of freedom, from a table
        assert row["loss"]["high"] - row["loss"]["value"] == pytest.approx(half, abs=2e-4)
    assert json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[0])["steps"] == 5
