"""Full fine-tuning, LoRA and Q-LoRA of the same model, on the same conversations, for the same steps, with three seeds.

Each run has a process of its own and follows the recipe smollm2-full, -lora or -qlora; the seeds take turns through the
methods, so that whatever else the machine does meets all of them. A row: what is trained; the loss and the share of
held-out answers that are right word by word, with the interval in which the mean of all seeds lies (95 %, Student's t);
the median time of a step; the most memory of the process while it learns, in all and beyond the loaded model (from the
kernel, so on Linux only). With --save the figures go where the book's chapter reads them.

    python benchmarks/finetune_methods.py [--model smollm2] [--steps 60] [--seeds 1 2 3] [--threads 2] [--save]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
METHODS = ("full", "lora", "qlora")
TARGET = Path(__file__).parent.parent / "aquila2_tut" / "train" / "methods.json"


def peak(reset: bool = False) -> int:
    """The most memory that the process has had, in bytes; with `reset` what it has now, from which the peak grows."""
    if reset:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading has given back is not the model's
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def tuner_of(name: str, seed: int, steps: int, folder: Path):
    """What `aquila2_tut.train.finetune` sets up for a recipe, before its first step."""
    from aquila2_tut import AutoLoader
    from aquila2_tut.train.finetuning import WORDS, choose_template, open_base, tunable
    from aquila2_tut.train.recipe import load_recipe
    from aquila2_tut.train.tuner import Tuner
    from aquila2_tut.train.tuning import Tuning
    from aquila2_tut.train.tuning_data import tuning_data

    recipe = replace(load_recipe(Tuning, name), seed=seed, steps=steps, eval_every=steps, save_every=10 * steps, ask=())
    loader = open_base(recipe, AutoLoader)
    template, tokenizer = choose_template(recipe, loader.name), loader.get_tokenizer()
    data = tuning_data(recipe, tokenizer, template)
    model = tunable(recipe, loader.get_model(), loader.name)
    return Tuner(model, recipe, data, tokenizer, template, folder, WORDS["en"])


def once(name: str, seed: int, steps: int, threads: int) -> dict:
    """One run."""
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        tuner = tuner_of(name, seed, steps, Path(folder))

        class Clock(TrainerCallback):
            times: list[float] = []

            def on_step_begin(self, *_, **__):
                self.begun = time.perf_counter()

            def on_step_end(self, args, state, control, **_):
                self.times.append(time.perf_counter() - self.begun)
                self.peak = peak()

        before = tuner.evaluate()
        clock, loaded = Clock(), peak(reset=True)
        tuner.add_callback(clock)
        tuner.train()
        after = tuner.evaluate()
    return {
        "seed": seed,
        "trainable": sum(p.numel() for p in tuner.model.parameters() if p.requires_grad),
        "seconds": round(statistics.median(clock.times[2:]), 3),
        "peak": clock.peak,
        "beyond": clock.peak - loaded,
        "loss": [round(run["eval_loss"], 4) for run in (before, after)],
        "right": [round(run["eval_right"], 4) for run in (before, after)],
        "curve": [round(entry["loss"], 4) for entry in tuner.state.log_history if "loss" in entry],
    }


def in_a_process(options: argparse.Namespace, method: str, seed: int) -> dict:
    command = [sys.executable, __file__, "--child", f"{options.model}-{method}", "--seeds", str(seed)]
    command += ["--steps", str(options.steps), "--threads", str(options.threads)]
    env = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{method}, seed {seed}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def interval(values: list[float]) -> dict[str, float]:
    """The mean, and the 95 % interval in which it lies by Student's t."""
    from scipy.stats import t

    mean = statistics.mean(values)
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"value": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


def summary(runs: list[dict]) -> dict:
    """The runs of a method, and what they say together."""
    together = {what: interval([run[what][1] for run in runs]) for what in ("loss", "right")}
    medians = {what: statistics.median_low(run[what] for run in runs) for what in ("seconds", "peak", "beyond")}
    return {"trainable": runs[0]["trainable"], **together, **medians, "runs": runs}


def show(results: dict[str, list[dict]]) -> None:
    heads = f"{'held-out loss':>18} {'answers right':>18} {'s/step':>7} {'peak GB':>8} {'beyond':>7}"
    print(f"{'':6} {'trained':>12} {heads}")
    for method, runs in results.items():
        row = summary(runs)
        loss, right = (f"{row[x]['value']:.3f} +- {row[x]['high'] - row[x]['value']:.3f}" for x in ("loss", "right"))
        figures = f"{row['seconds']:7.2f} {row['peak'] / 1e9:8.2f} {row['beyond'] / 1e9:7.2f}"
        print(f"{method:6} {row['trainable']:12,} {loss:>18} {right:>18} {figures}")


def conditions(options: argparse.Namespace) -> dict:
    import bitsandbytes
    import peft
    import torch
    import transformers

    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, bitsandbytes)}
    return {
        "model": options.model,
        "steps": options.steps,
        "seeds": options.seeds,
        "threads": options.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/finetune_methods.py --model {options.model} --threads {options.threads} --save",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=("smollm2", "nano"))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--child")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(once(options.child, options.seeds[0], options.steps, options.threads)))
        return
    results: dict[str, list[dict]] = {method: [] for method in options.methods}
    for seed in options.seeds:
        for method in options.methods:
            results[method].append(in_a_process(options, method, seed))
            print(method, json.dumps(results[method][-1]), file=sys.stderr, flush=True)
            if options.save:  # what has been measured is kept, whatever happens to the rest
                saved = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else {}
                found = {method: summary(runs) for method, runs in results.items() if runs}
                saved[options.model] = {"conditions": conditions(options), "methods": found}
                TARGET.write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    main()
