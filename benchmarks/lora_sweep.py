"""Quality over the rank of adapters, the maps that get one, and the bits of the frozen weights, with real training.

Aquila2-Nano-Chat learns bookings by the recipe nano-lora with two rows a step, and each run has a process of its own.
The seeds take turns through the grid, so that a sweep that is stopped early has all of the grid for fewer seeds. Each
finished run is a line in a file; the same command goes on from there. The learning rate is the same for all: no better
one was searched for, for any.

A row: what is trained; loss in nats and share of right answers on the held-out bookings, with the interval in which the
mean of all seeds lies (95 %, Student's t); the most memory of the process while it learns (from the kernel, so on Linux
only); seconds of the processor a step, which other work on the machine changes less than those of a clock. Bits are
those of the frozen weights: 32 on a CPU are what 16 are on a GPU, weights that are not quantized.

    python benchmarks/lora_sweep.py [--steps 100] [--seeds 1 2 3] [--minutes 50] [--runs FILE] [--save]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from finetune_methods import interval, peak
from transformers import TrainerCallback

from aquila2_tut import AutoLoader
from aquila2_tut.train.finetuning import WORDS, choose_template, tunable
from aquila2_tut.train.recipe import load_recipe
from aquila2_tut.train.tuner import Tuner
from aquila2_tut.train.tuning import Tuning
from aquila2_tut.train.tuning_data import tuning_data

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "aquila2_tut" / "train" / "lora_sweep.json"
MAPS = {
    "q+v": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all": ("all-linear",),
}
BITS = {32: None, 8: "int8", 4: "nf4"}
GRID = [
    *((maps, r, bits) for bits in (32, 4) for maps, r in (("all", 2), ("all", 8), ("all", 32), ("attention", 8))),
    *((maps, r, bits) for bits in (32, 4) for maps, r in (("q+v", 8), ("q+v", 32))),
    ("all", 8, 8),
]


class Clock(TrainerCallback):
    """Seconds of the processor that each step takes, and the most memory after it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        self.begun = time.process_time()

    def on_step_end(self, *_, **__) -> None:
        self.times.append(time.process_time() - self.begun)
        self.peak = peak()


def tuner_of(maps: str, r: int, bits: int, seed: int, steps: int, folder: Path) -> Tuner:
    """What learns, before its first step."""
    fields = {"r": r, "alpha": 2 * r, "targets": MAPS[maps], "method": "qlora" if bits < 32 else "lora"}
    moments = {"eval_every": 10 * steps, "save_every": 10 * steps, "ask": ()}
    recipe = replace(load_recipe(Tuning, "nano-lora"), seed=seed, steps=steps, batch_size=2, **fields, **moments)
    loader = AutoLoader("aquila2", recipe.base, quantization_config=BITS[bits], device="cpu", torch_dtype=torch.float32)
    template, tokenizer = choose_template(recipe, loader.name), loader.get_tokenizer()
    data = tuning_data(recipe, tokenizer, template)
    return Tuner(
        tunable(recipe, loader.get_model(), loader.name), recipe, data, tokenizer, template, folder, WORDS["en"]
    )


def once(maps: str, r: int, bits: int, seed: int, steps: int) -> dict:
    """One run."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tuner, clock = tuner_of(maps, r, bits, seed, steps, Path(folder)), Clock()
        tuner.add_callback(clock)
        loaded = peak(reset=True)
        tuner.train()
        after = tuner.evaluate()
    return {
        **{"maps": maps, "r": r, "bits": bits, "seed": seed, "steps": steps},
        "trained": sum(p.numel() for p in tuner.model.parameters() if p.requires_grad),
        "loss": round(after["eval_loss"], 4),
        "right": round(after["eval_right"], 4),
        "seconds": round(statistics.median(clock.times[2:]), 4),
        **{"peak": clock.peak, "beyond": clock.peak - loaded},
    }


def in_a_process(job: tuple) -> dict:
    """One run, in a process that has what is imported here and nothing else."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(once, job)


def read_runs(file: Path) -> dict[tuple, dict]:
    """The runs that are finished, by what they were; a line that was cut when the sweep was killed is none."""
    runs = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            run = json.loads(line)
            runs[tuple(run[key] for key in ("maps", "r", "bits", "seed", "steps"))] = run
    return runs


def keep_run(file: Path, run: dict) -> None:
    """A line more, on a line of its own whatever is before it."""
    before = file.read_bytes() if file.exists() else b""
    start = "\n" if before and not before.endswith(b"\n") else ""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(start + json.dumps(run) + "\n")


def sweep(options: argparse.Namespace) -> list[dict]:
    """All runs that are not there yet, as long as there is time."""
    runs, begun = read_runs(options.runs), time.monotonic()
    wanted = [(*place, seed, options.steps) for seed in options.seeds for place in GRID]
    options.runs.parent.mkdir(parents=True, exist_ok=True)
    for job in wanted:
        if job not in runs and time.monotonic() - begun < 60 * options.minutes:
            runs[job] = in_a_process(job)
            keep_run(options.runs, runs[job])
            print(json.dumps(runs[job]), flush=True)
    return [runs[job] for job in wanted if job in runs]


def rows(runs: list[dict]) -> list[dict]:
    """What the runs of each place of the grid say together."""
    found = []
    for maps, r, bits in GRID:
        same = sorted(
            (run for run in runs if (run["maps"], run["r"], run["bits"]) == (maps, r, bits)), key=lambda x: x["seed"]
        )
        if not same:
            continue
        together = {what: interval([run[what] for run in same]) for what in ("loss", "right")}
        medians = {what: statistics.median_low(run[what] for run in same) for what in ("seconds", "peak", "beyond")}
        kept = [{key: run[key] for key in ("seed", "loss", "right", "seconds", "peak", "beyond")} for run in same]
        place = {"maps": maps, "r": r, "bits": bits, "trained": same[0]["trained"]}
        found.append({**place, **together, **medians, "runs": kept})
    return found


def conditions(options: argparse.Namespace) -> dict:
    names = ("torch", "transformers", "peft", "bitsandbytes")
    return {
        "model": "Aquila2-Nano-Chat",
        "recipe": "nano-lora, but 2 rows a step and alpha = 2 r",
        "steps": options.steps,
        "seeds": options.seeds,
        "held_out": 80,
        "threads": 1,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {name: version(name) for name in names},
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/lora_sweep.py --steps {options.steps} --save",
    }


def show(table: list[dict]) -> None:
    heads = f"{'held-out loss':>18} {'answers right':>18} {'s/step':>7} {'peak GB':>8}"
    print(f"{'maps':10} {'rank':>4} {'bits':>4} {'trained':>10} {'seeds':>5} {heads}")
    for row in table:
        loss, right = (f"{row[x]['value']:.3f} +- {row[x]['high'] - row[x]['value']:.3f}" for x in ("loss", "right"))
        place = f"{row['maps']:10} {row['r']:4} {row['bits']:4} {row['trained']:10,} {len(row['runs']):5}"
        print(f"{place} {loss:>18} {right:>18} {row['seconds']:7.2f} {row['peak'] / 1e9:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--minutes", type=float, default=50, help="after which no run is begun any more")
    parser.add_argument("--runs", type=Path, default=ROOT / "_build" / "lora_sweep.jsonl")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    table = rows(sweep(options))
    show(table)
    if options.save:
        text = json.dumps({"conditions": conditions(options), "rows": table}, indent=1, ensure_ascii=False)
        TARGET.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
