"""Pretraining on a CPU: our trainer against transformers' Trainer with a LlamaForCausalLM of the same shape.

Both begin with the same weights, see the same rows in the same order and take the same steps; each runs in a process of
its own, several times, alternating. Prints tokens per second (the best of each), the peak memory of the process, the
ratios, and how far apart the two loss curves are. The rows come from the texts of the running Python.

    python benchmarks/pretrain.py [--rounds 2] [--steps 6] [--batch 16] [--threads 2] [--precision float32 bfloat16]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
SIDES = ("transformers", "ours")
LENGTH = 512


def rows(count: int):
    """One document a row, for LlamaForCausalLM knows no packed ones. Bytes are tokens: no vocabulary is needed."""
    import numpy as np

    from aquila2_tut.data import Row, documents

    text = "".join(document.text for document in documents("python-docs")).encode()
    ids = np.frombuffer(text[: count * LENGTH], np.uint8).astype(np.int32).reshape(count, LENGTH)
    labels = np.where(np.arange(LENGTH) == 0, -100, ids)
    return [Row(a, b.astype(np.int32), np.ones(LENGTH, np.int32)) for a, b in zip(ids, labels, strict=True)]


def models():
    """Both models, with the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from aquila2_tut import Aquila2Config, Aquila2ForCausalLM

    config = Aquila2Config.preset("Aquila2-Nano", dtype="float32")
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "pad_token_id",
              "bos_token_id", "eos_token_id", "initializer_range")  # fmt: skip
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in shared}))
    ours = Aquila2ForCausalLM(config)
    ours.load_state_dict(llama.state_dict())
    return {"transformers": llama, "ours": ours}


def trainer(side: str, folder: str, options: argparse.Namespace):
    from transformers import Trainer, TrainingArguments

    from aquila2_tut.data import collate
    from aquila2_tut.train.trainer import Aquila2Trainer

    arguments = TrainingArguments(
        folder, max_steps=options.steps, per_device_train_batch_size=options.batch, learning_rate=1e-3, logging_steps=1,
        report_to="none", save_strategy="no", use_cpu=True, bf16=options.precision[0] == "bfloat16", disable_tqdm=True,
        remove_unused_columns=False, optim="adamw_torch_fused", weight_decay=0.1,
    )  # fmt: skip
    model, data = models()[side], rows(options.steps * options.batch)
    if side == "ours":
        return Aquila2Trainer(model, arguments, data)

    def join(items):
        return {name: x for name, x in collate(items, 0).items() if name != "document_ids"}

    return Trainer(model, arguments, train_dataset=data, data_collator=join)


def once(side: str, options: argparse.Namespace) -> dict:
    """One run of one side; the first step, in which everything is set up, is not timed."""
    import torch
    from inference import Peak
    from transformers import TrainerCallback

    torch.set_num_threads(options.threads)
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments, **kwargs):
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, Peak() as peak:
        runs = trainer(side, folder, options)
        runs.add_callback(Clock())
        runs.train()
    losses = [entry["loss"] for entry in runs.state.log_history if "loss" in entry]
    best = min(after - before for before, after in pairwise(times))
    return {"rate": options.batch * LENGTH / best, "peak": peak.bytes, "losses": losses}


def measured(side: str, precision: str, options: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--once", side, "--precision", precision]
    command += [f"--{name}={getattr(options, name)}" for name in ("steps", "batch", "threads")]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def report(precision: str, options: argparse.Namespace) -> None:
    runs = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            runs[side].append(measured(side, precision, options))
    rate = {side: max(run["rate"] for run in runs[side]) for side in SIDES}
    peak = {side: min(run["peak"] for run in runs[side]) for side in SIDES}
    apart = max(abs(a - b) / b for a, b in zip(*(runs[side][0]["losses"] for side in reversed(SIDES)), strict=True))
    for side in SIDES:
        print(f"{precision:9} {side:13} {rate[side]:8,.0f} {peak[side] / 1e6:8,.0f}")
    ratios = rate["ours"] / rate["transformers"], peak["ours"] / peak["transformers"]
    print(f"{'':9} {'ratio':13} {ratios[0]:8.2f} {ratios[1]:8.2f}   loss curves at most {apart:.1e} apart", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16, help=f"rows of {LENGTH} tokens a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--once", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(once(options.once, options)))
        return
    print(f"Aquila2-Nano, {options.batch} rows of {LENGTH} tokens a step, {options.threads} threads")
    print(f"{'precision':9} {'side':13} {'tokens/s':>8} {'peak MB':>8}")
    for precision in options.precision:
        report(precision, options)


if __name__ == "__main__":
    main()
