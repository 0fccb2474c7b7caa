"""Rank, targets and bits of adapters on the book's own small model, with three seeds each.

Every run follows the recipe nano-lora, or nano-qlora where the weights lie in four bits, with the rank and the targets
of its row. A row: what is trained, and the held-out loss in nats with the interval in which the mean of all seeds lies
(95 %, Student's t). With --save the figures go where the book's chapter reads them.

    OMP_NUM_THREADS=1 python benchmarks/lora_sweep.py [--save]      # a quarter of an hour
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from datetime import date
from importlib.metadata import version
from io import StringIO
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from finetune_methods import TARGET, interval

from aquila2_tut import AutoLoader
from aquila2_tut.train import Tuning, finetune
from aquila2_tut.train.recipe import load_recipe

SEEDS, STEPS = (1, 2, 3), 60
TWO, ALL = ("q_proj", "v_proj"), ("all-linear",)
# name -> method, rank, targets
ROWS = {
    "q and v, r 16": ("lora", 16, TWO),
    "all, r 2": ("lora", 2, ALL),
    "all, r 16": ("lora", 16, ALL),
    "all, r 64": ("lora", 64, ALL),
    "all, r 16, NF4": ("qlora", 16, ALL),
}


def once(method: str, r: int, targets: tuple[str, ...], seed: int) -> dict[str, float]:
    """One run."""
    options = {"steps": STEPS, "eval_every": STEPS, "save_every": STEPS, "log_every": STEPS, "ask": ()}
    recipe = load_recipe(
        Tuning, f"nano-{method}", r=r, alpha=2 * r, targets=list(targets), seed=seed, precision="float32", **options
    )
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        left = finetune(recipe, Path(folder) / "run", AutoLoader)
        log = json.loads((left / "log.json").read_text("utf-8"))
        saved = sum(file.stat().st_size for file in left.glob("adapter*.safetensors"))
    last = [entry for entry in log if "eval_loss" in entry][-1]
    return {"seed": seed, "loss": round(last["eval_loss"], 4), "trainable": saved // 4}


def main(save: bool) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    runs = {name: [] for name in ROWS}
    for seed in SEEDS:
        for name, row in ROWS.items():
            runs[name].append(once(*row, seed))
            print(name, json.dumps(runs[name][-1]), flush=True)
    rows = {}
    for name, (method, r, targets) in ROWS.items():
        loss = interval([run["loss"] for run in runs[name]])
        rows[name] = {"method": method, "r": r, "targets": list(targets), "loss": loss, "runs": runs[name]}
        print(f"{name:16} {loss['value']:.3f} [{loss['low']:.3f}, {loss['high']:.3f}]")
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    conditions = {
        "model": "Aquila2-Nano-Chat",
        "steps": STEPS,
        "seeds": list(SEEDS),
        "threads": torch.get_num_threads(),
    }
    conditions |= {"machine": f"{platform.machine()}, no GPU", "versions": versions, "date": str(date.today())}
    conditions["command"] = "python benchmarks/lora_sweep.py --save"
    if save:
        kept = json.loads(TARGET.read_text("utf-8"))
        kept["nano-sweep"] = {"conditions": conditions, "methods": rows}
        TARGET.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main("--save" in sys.argv[1:])
