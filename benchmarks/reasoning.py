"""Does tuning on answers, or on chains of thought, make a small chat model reason better? And what does a leak do?

The README's experiment in small, see `aquila2_tut/evaluate/reasoning.py`: Aquila2-Nano-Chat as it is, tuned on
questions and answers (SFT), and on the same questions with chains of thought (SFT + CoT); and the story of GSM8K in
small, see `aquila2_tut/evaluate/leak.py`: tuned with a test among the training data and without it. Each run stores
what it found; killed, the command goes on where it was, also in the midst of a run. With --save the figures go where
the book reads them.

    python benchmarks/reasoning.py [--seeds 1 2 3 4 5] [--leak-seeds 1 2 3] [--threads 2] [--folder FOLDER] [--save]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "aquila2_tut" / "evaluate" / "reasoning.json"
BASE = "Aquila2-Nano-Chat"


def told(what: str) -> None:
    """Progress, apart from the results."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def opened() -> tuple[Any, Any]:
    """The chat model in float32, and its tokenizer."""
    import torch

    from aquila2_tut import AutoLoader

    loader = AutoLoader(model_name=str(ROOT / "data" / BASE), device="cpu", torch_dtype=torch.float32)
    return loader.get_model(), loader.get_tokenizer()


def bits(right: list[bool]) -> str:
    """A mark an item, "1" where it is right: short, and every statistic can be had from it."""
    return "".join("01"[one] for one in right)


def reasoning_run(variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """A model as it is, or tuned, and what it has right."""
    from aquila2_tut.evaluate import reasoning

    plan = reasoning.Plan()
    model, tokenizer = opened()
    log, begun, cot = [], time.perf_counter(), variant in reasoning.THINKING
    if variant in reasoning.TUNED:
        instances = reasoning.training_set(plan, seed)
        settings = plan.settings(seed, len(instances))
        log = reasoning.tune(model, tokenizer, instances, settings, cot=cot, folder=folder, on_step=tell)
    tuned = time.perf_counter()
    asked = reasoning.test_set(plan)
    outputs = {task: reasoning.written(model, tokenizer, some, cot=cot) for task, some in asked.items()}
    found = {
        "generation": {task: bits(reasoning.right(some, outputs[task])) for task, some in asked.items()},
        "likelihood": {task: bits(reasoning.likeliest(model, tokenizer, some)) for task, some in asked.items()},
    }
    if cot:
        found["wrong_step"] = {
            task: "".join(map(str, map(reasoning.first_wrong_step, some, outputs[task])))
            for task, some in asked.items()
        }
    return {
        "variant": variant,
        "seed": seed,
        **found,
        "tokens": sum(step.tokens for step in log),
        "losses": [round(step.loss, 3) for step in log[9::10]],
        "seconds": {"tuning": round(tuned - begun), "judging": round(time.perf_counter() - tuned)},
    }


def leak_run(variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """A model tuned with the test in the training data or without, and what it has right of that test and another."""
    from aquila2_tut.evaluate import leak, reasoning

    plan = leak.LeakPlan()
    model, tokenizer = opened()
    training = leak.training_data(plan, seed, leak=variant == "leak")
    reasoning.tune(model, tokenizer, training, plan.settings(seed), cot=False, folder=folder, on_step=tell)
    tests = {"leaked": leak.leaked_test(plan, seed), "fresh": leak.fresh_test(plan, seed)}
    outputs = {name: reasoning.written(model, tokenizer, some, cot=False) for name, some in tests.items()}
    return {
        "variant": variant,
        "seed": seed,
        "right": {name: bits(reasoning.right(some, outputs[name])) for name, some in tests.items()},
        "found": {name: leak.found_in(some, training) for name, some in tests.items()},
    }


def tell(step: Any) -> None:
    """A line every 50 steps."""
    if step.step % 50 == 0:
        told(f"  step {step.step}: loss {step.loss:.3f}")


Job = tuple[str, str, int, Callable[[str, int, Path], dict[str, Any]]]


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """All runs, one seed after another: whenever it ends, whole seeds are there."""
    yield from (("reasoning", variant, 0, reasoning_run) for variant in ("chat", "think"))
    for seed in sorted({*options.seeds, *options.leak_seeds}):
        if seed in options.seeds:
            yield from (("reasoning", variant, seed, reasoning_run) for variant in ("sft", "cot"))
        if seed in options.leak_seeds:
            yield from (("leak", variant, seed, leak_run) for variant in ("clean", "leak"))


def done(folder: Path, kind: str, variant: str, seed: int, run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What a run found, now or before."""
    file, work = folder / f"{kind}-{variant}-{seed}.json", folder / f"{kind}-{variant}-{seed}"
    if not file.exists():
        told(f"{kind}: {variant}, seed {seed}")
        found = json.dumps(run(variant, seed, work))
        file.with_suffix(".new").write_text(found, encoding="utf-8")
        file.with_suffix(".new").replace(file)
    shutil.rmtree(work, ignore_errors=True)
    return json.loads(file.read_text(encoding="utf-8"))


def conditions(threads: int) -> dict[str, Any]:
    """Where and with what it was measured."""
    import torch
    import transformers

    return {
        "model": BASE,
        "threads": threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/reasoning.py --threads {threads} --save",
    }


def plans() -> dict[str, Any]:
    """How both experiments go."""
    from aquila2_tut.evaluate.leak import LeakPlan
    from aquila2_tut.evaluate.reasoning import Plan

    return {"reasoning": asdict(Plan()), "leak": asdict(LeakPlan())}


def claim(folder: Path) -> None:
    """Makes the folder, or sees that what is in it was done by the same plans."""
    from aquila2_tut.train.checkpoints import refuse_other_settings

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "plans.json"
    if file.exists():
        refuse_other_settings(folder, json.loads(file.read_text(encoding="utf-8")), plans())
    file.write_text(json.dumps(plans()), encoding="utf-8")


def collected(found: list[tuple[str, dict[str, Any]]], threads: int) -> dict[str, Any]:
    """What the book reads: conditions, plans and all runs."""
    runs = {kind: [run for of, run in found if of == kind] for kind in ("reasoning", "leak")}
    return {"conditions": conditions(threads)} | {kind: {"plan": p, "runs": runs[kind]} for kind, p in plans().items()}


def report(kind: str, run: dict[str, Any]) -> str:
    """A run in a line."""
    tables = run["right"] if kind == "leak" else {way: run[way] for way in ("generation", "likelihood")}
    words = [f"{kind:9} {run['variant']:5} seed {run['seed']}"]
    for name, marks in tables.items():
        each = marks.items() if isinstance(marks, dict) else [("", marks)]
        words.append(f"{name}: " + " ".join(f"{task} {right.count('1') / len(right):4.0%}" for task, right in each))
    return "  ".join(words)


def main() -> None:
    """Does what has not been done, and prints a line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3, 4, 5])
    parser.add_argument("--leak-seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "checkpoints" / "reasoning", help="keeps what is done")
    parser.add_argument("--save", action="store_true", help="write the figures that the book reads")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    claim(options.folder)
    found = []
    for kind, variant, seed, run in jobs(options):
        found.append((kind, done(options.folder, kind, variant, seed, run)))
        print(report(*found[-1]), flush=True)
        if options.save:  # what has been measured is kept, whatever happens to the rest
            text = json.dumps(collected(found, options.threads), indent=1, ensure_ascii=False)
            TARGET.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
