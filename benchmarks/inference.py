"""SmolLM2 on a CPU: this package against transformers' own GGUF path, in one run, turn by turn.

Measures the time to load, the peak memory of the process, the prefill of 512 tokens and the decoding of 128, each side
in a process of its own and several times, alternating. Prints the best of each and the ratios; beside them the memory
bandwidth of the machine, which is the limit of decoding: every token reads every weight once.

    python benchmarks/inference.py [--rounds 3] [--threads 2] [--once SIDE]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SIDES = ("transformers", "ours", "ours-bf16")
PREFILL, DECODE = 512, 128
TEXT = "The lighthouse keeper wrote down the weather every evening, and nobody ever read what he had written. "


def resident() -> float:
    """Bytes of this process that are in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class Peak:
    """The largest resident size while a block runs, seen every 2 ms."""

    def __enter__(self):
        self.bytes, self._stop = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, resident())

    def __exit__(self, *raised):
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, resident())


def load_transformers():
    """The peer: transformers reads the same GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from aquila2_tut import assets

    file = assets.path("smollm2-135m")
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(**where)


def load_ours(dtype: str):
    """This package, as a reader of the book loads it."""
    from aquila2_tut import AutoLoader

    loader = AutoLoader("aquila2", model_name="SmolLM2-135M", device="cpu", torch_dtype=dtype, local_files_only=True)
    return loader.get_model(), loader.get_tokenizer()


def prefill(model, ids) -> float:
    """Seconds for one forward pass of (1, 512) that scores the last position, as generation does; the best of 5."""
    import torch

    best = float("inf")
    with torch.inference_mode():
        for _ in range(5):
            start = time.perf_counter()
            model(ids, use_cache=True, logits_to_keep=1)
            best = min(best, time.perf_counter() - start)
    return best


def decode_transformers(model, ids) -> float:
    """Seconds a token of greedy `generate`, without its prefill."""
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def run(tokens: int) -> float:
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **settings)
        return time.perf_counter() - start

    run(2)
    return min((run(DECODE + 1) - run(1)) / DECODE for _ in range(2))


def decode_ours(model, tokenizer) -> float:
    """Seconds a token of greedy `stream`, turning tokens into text included, without its prefill."""
    from unittest.mock import patch

    from aquila2_tut.chat import generate

    def run() -> float:
        pieces = model.stream(TEXT, tokenizer=tokenizer, sft=False, temperature=0, max_gen_len=DECODE + 1)
        next(pieces)
        start = time.perf_counter()
        for _ in pieces:
            pass
        return (time.perf_counter() - start) / DECODE

    with patch.object(generate._Format, "stop_ids", lambda *_: []):  # the peer is told to ignore its eos as well
        return min(run() for _ in range(2))


def measure(side: str) -> dict[str, float]:
    """Everything about one side; runs in a process of its own."""
    import torch
    import transformers

    import aquila2_tut.model  # noqa: F401  (so that neither side pays for imports)

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    before = resident()
    start = time.perf_counter()
    with Peak() as load_peak:
        model, tokenizer = (
            load_transformers() if side == "transformers" else load_ours({"ours": "float32"}.get(side, "bfloat16"))
        )
    loaded = time.perf_counter() - start
    ids = tokenizer(TEXT * 40, return_tensors="pt").input_ids[:, :PREFILL]
    with Peak() as run_peak:
        prefilled = prefill(model, ids)
        prompt = tokenizer(TEXT, return_tensors="pt").input_ids
        decoded = decode_transformers(model, prompt) if side == "transformers" else decode_ours(model, tokenizer)
    return {
        "load": loaded,
        "imports_bytes": before,
        "peak_bytes": max(load_peak.bytes, run_peak.bytes),
        "load_peak_bytes": load_peak.bytes,
        "prefill": prefilled,
        "decode": decoded,
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def bandwidth() -> float:
    """Bytes a second that this machine reads when it adds up 512 MB of float32; the best of 7."""
    import torch

    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    data, best = torch.ones(128 * 1024 * 1024), float("inf")
    for _ in range(7):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.numel() * 4 / best


def in_a_process(task: str, threads: int, script: Path = Path(__file__)) -> dict[str, float]:
    """Runs a script such as this for one task and reads what it prints last."""
    env = os.environ | {"BENCH_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, str(script), "--once", task], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{task} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def best_of(runs: list[dict[str, float]]) -> dict[str, float]:
    """The best of each figure: what disturbs a measurement only ever makes it larger."""
    return {key: min(run[key] for run in runs) for key in runs[0]}


def report(results: dict[str, dict[str, float]], read: float, rounds: int, threads: int) -> None:
    """Prints the table and the ratios."""
    print(f"SmolLM2-135M, {threads} threads, best of {rounds} rounds, alternating; memory read {read / 1e9:.1f} GB/s")
    print(f"{'':14}{'load s':>9}{'peak MB':>10}{'- imports':>11}{'prefill tok/s':>15}{'decode tok/s':>14}{'limit':>8}")
    for side, r in results.items():
        net = r["peak_bytes"] - r["imports_bytes"]
        print(
            f"{side:14}{r['load']:9.2f}{r['peak_bytes'] / 1e6:10.0f}{net / 1e6:11.0f}"
            f"{PREFILL / r['prefill']:15.0f}{1 / r['decode']:14.1f}{read / r['weight_bytes']:8.0f}"
        )
    peer = results["transformers"]
    for side in SIDES[1:]:
        ours = results[side]
        net = (ours["peak_bytes"] - ours["imports_bytes"]) / (peer["peak_bytes"] - peer["imports_bytes"])
        print(
            f"{side} / transformers: load time x{ours['load'] / peer['load']:.2f}, "
            f"peak memory x{ours['peak_bytes'] / peer['peak_bytes']:.2f} (without imports x{net:.2f}), "
            f"prefill speed x{peer['prefill'] / ours['prefill']:.2f}, "
            f"decode speed x{peer['decode'] / ours['decode']:.2f}"
        )


def main() -> None:
    """Alternates the sides and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--once", choices=[*SIDES, "bandwidth"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps({"bytes_per_second": bandwidth()} if args.once == "bandwidth" else measure(args.once)))
        return
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    reads = []
    for number in range(args.rounds):
        reads.append(in_a_process("bandwidth", args.threads)["bytes_per_second"])
        for side in SIDES:
            print(f"round {number + 1} of {args.rounds}: {side}", file=sys.stderr, flush=True)
            runs[side].append(in_a_process(side, args.threads))
    report({side: best_of(found) for side, found in runs.items()}, max(reads), args.rounds, args.threads)


if __name__ == "__main__":
    main()
