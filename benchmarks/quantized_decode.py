"""Decoding with quantized weights on a CPU: every path of this package beside transformers, and llama.cpp as yardstick.

Each side runs in a process of its own, several times, alternating; the best of each is taken. Printed are the bytes of
the weights, the memory of the process, prefill (512 tokens), decoding (128 tokens) and what the memory's bandwidth
would allow if nothing but weights took time; and bits per byte of held-out English, for speed alone is easy to have.
llama.cpp reads the same file; it takes part where llama-cpp-python is installed.

    python benchmarks/quantized_decode.py [--rounds 3] [--threads 2] [--sides NAME ...] [--save]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import inference
from inference import DECODE, PREFILL, TEXT, Peak, best_of, resident

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "aquila2_tut" / "quant" / "speed.json"
GRID_FOLDERS = "BENCH_GRIDS"  # where the parent has written the checkpoints with grids
YARDSTICK, BASE, CLOSER = "llama.cpp", "transformers", "closer:{}"
# What limits each: the operators that take a token's time in `look_closer`, against the bytes that it has to read.
LIMITS = {
    "transformers": {
        "en": "torch's own float32 product of a matrix and a vector, which uses a quarter of the bandwidth",
        "zh": "torch 自带的 float32 矩阵乘向量：读内存只用到带宽的四分之一",
    },
    "ours-fp32": {
        "en": "the bytes: 538 MB a token, which oneDNN reads at about half of the memory's bandwidth",
        "zh": "字节数：每个词元要读 538 MB，oneDNN 约用到内存带宽的一半",
    },
    "ours-bf16": {
        "en": "products for more than half of the time, the small matrices slowest for their size; the rest is Python",
        "zh": "一半以上时间在乘法上，其中小矩阵相对最慢；其余是 Python 开销",
    },
    "bnb-int8": {
        "en": "framework overhead: 130 operators for each product (quantize the input, look for outliers, scale "
        "back); the integer product itself is less than a tenth of their time",
        "zh": "框架开销：每次乘法要调用约 130 个算子（量化输入、找离群列、再缩放回来），整数乘法本身不到其中十分之一",
    },
    "torchao-int8": {
        "en": "dequantize, then multiply: all codes are written out in bfloat16 for each product, and read again",
        "zh": "先反量化再相乘：每次都把全部编码展开成 bfloat16 写进内存，再读一遍",
    },
    "torchao-int4": {
        "en": "framework overhead: of the operators' time the four-bit kernel takes a third and the head in "
        "bfloat16 a quarter; between them is Python",
        "zh": "框架开销：算子时间里 4 比特内核占三分之一，bfloat16 的输出层占四分之一；算子之间是 Python",
    },
    "bnb-nf4": {
        "en": "bitsandbytes' four-bit kernel, two fifths of the operators' time, and the head in bfloat16, a "
        "fifth; then Python",
        "zh": "bitsandbytes 的 4 比特内核占算子时间的五分之二，bfloat16 的输出层占五分之一；再就是 Python",
    },
    "nf4-by-hand": {
        "en": "dequantize, then multiply: nearly all of the time goes into looking up and writing out weights",
        "zh": "先反量化再相乘：时间几乎都花在查表和把权重写进内存上",
    },
    "rtn-3": {
        "en": "no kernel for 3 bits: 150,000 operators a token unpack the codes, before anything is multiplied",
        "zh": "没有 3 比特内核：每个词元要用约 15 万个算子解包编码，之后才做乘法",
    },
    "int4": {
        "en": "framework overhead: products are less than half of the time, Python and small operators the rest",
        "zh": "框架开销：乘法不到一半时间，其余是 Python 和小算子",
    },
    "gguf": {
        "en": "the same as `int4`; blocks of 32 have twice as many scales to read as its groups of 64",
        "zh": "与 `int4` 相同；每块 32 个权重，缩放系数比每组 64 个时多一倍",
    },
    "llama.cpp": {
        "en": "the products themselves, codes made into numbers included: the file is read at a quarter of the "
        "memory's bandwidth",
        "zh": "乘法本身（包括把编码还原成数）：读文件只用到内存带宽的四分之一",
    },
}


def load_named(**how: Any) -> tuple[Any, Any]:
    """A model of this package and its tokenizer."""
    from aquila2_tut import AutoLoader

    how = {"model_name": "SmolLM2-135M", "device": "cpu", "local_files_only": True} | how
    loader = AutoLoader("aquila2", **how)
    return loader.get_model(), loader.get_tokenizer()


def load_by_hand() -> tuple[Any, Any]:
    """NF4 in layers that are written to be read."""
    from aquila2_tut.quant import Scheme, quantize_model

    model, tokenizer = load_named(torch_dtype="bfloat16")
    return quantize_model(model, Scheme("nf4")), tokenizer


def load_grid(bits: int) -> tuple[Any, Any]:
    """A checkpoint as `aquila2-tut quantize` writes it."""
    return load_named(model_name=str(Path(os.environ[GRID_FOLDERS]) / str(bits)))


LOADERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "transformers": inference.load_transformers,
    "ours-fp32": lambda: load_named(torch_dtype="float32"),
    "ours-bf16": lambda: load_named(torch_dtype="bfloat16"),
    "bnb-int8": lambda: load_named(quantization_config="int8"),
    "torchao-int8": lambda: load_named(quantization_config="torchao-int8"),
    "torchao-int4": lambda: load_named(quantization_config="torchao-int4"),
    "bnb-nf4": lambda: load_named(quantization_config="nf4"),
    "nf4-by-hand": load_by_hand,
    "rtn-3": lambda: load_grid(3),
    "int4": lambda: load_grid(4),
    "gguf": lambda: load_named(quantization_config="gguf"),
}
SIDES = (*LOADERS, YARDSTICK)


def measure(side: str) -> dict[str, float]:
    """Everything about one side; runs in a process of its own."""
    if side == YARDSTICK:
        return measure_llama_cpp()
    import torch
    import transformers

    import aquila2_tut.model  # noqa: F401  (so that no side pays for imports)

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    before = resident()
    model, tokenizer = LOADERS[side]()
    ids = tokenizer(TEXT * 40, return_tensors="pt").input_ids[:, :PREFILL]
    with Peak() as peak:
        prefilled = inference.prefill(model, ids)
        prompt = tokenizer(TEXT, return_tensors="pt").input_ids
        if side == BASE:
            decoded = inference.decode_transformers(model, prompt)
        else:
            decoded = inference.decode_ours(model, tokenizer)
    return {
        "prefill": prefilled,
        "decode": decoded,
        "peak_bytes": peak.bytes - before,
        "weight_bytes": weight_bytes(model),
        "products": products_alone(model),
    }


def measure_llama_cpp() -> dict[str, float]:
    """llama.cpp with the same file."""
    from llama_cpp import Llama

    from aquila2_tut import assets

    threads, file, before = int(os.environ["BENCH_THREADS"]), assets.path("smollm2-135m"), resident()
    model = Llama(str(file), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    ids = model.tokenize((TEXT * 40).encode(), add_bos=False)[:PREFILL]
    prefilled = decoded = float("inf")
    with Peak() as peak:
        for _ in range(3):
            model.reset()
            start = time.perf_counter()
            model.eval(ids)
            prefilled = min(prefilled, time.perf_counter() - start)
            model.reset()
            model.eval(ids[:20])
            start = time.perf_counter()
            for _ in range(DECODE):
                model.eval([model.sample(temp=0.0)])
            decoded = min(decoded, (time.perf_counter() - start) / DECODE)
    size = file.stat().st_size
    return {"prefill": prefilled, "decode": decoded, "peak_bytes": peak.bytes - before, "weight_bytes": size}


def weight_bytes(model: Any) -> int:
    """Bytes of all that is stored, each storage once, those that libraries hide included."""
    found: dict[int, int] = {}
    seen: set[int] = set()

    def visit(thing: Any) -> None:
        import torch

        if id(thing) in seen or isinstance(thing, type | str | bytes):
            return
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor) and not hasattr(thing, "__tensor_flatten__") and not thing.is_meta:
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        parts = list(thing.values()) if isinstance(thing, dict) else []
        for part in [*parts, *getattr(thing, "__dict__", {}).values()]:
            visit(part)

    for module in model.modules():
        visit(module._parameters), visit(module._buffers)
        visit({k: v for k, v in vars(module).items() if k not in ("_modules", "config", "_parameters", "_buffers")})
    return sum(found.values())


def products_alone(model: Any) -> float:
    """Seconds that the linear maps of one token take when they run one after the other, with nothing in between."""
    import torch

    maps = [m for m in model.modules() if hasattr(m, "in_features") and not list(m.children())]
    dtype = next(model.parameters()).dtype
    inputs = {m.in_features: torch.randn(1, 1, m.in_features, dtype=dtype) for m in maps}
    best = float("inf")
    with torch.inference_mode(), decoding(model):
        for _ in range(5):
            start = time.perf_counter()
            for m in maps:
                m(inputs[m.in_features])
            best = min(best, time.perf_counter() - start)
    return best


def decoding(model: Any) -> AbstractContextManager[Any]:
    """What answers are wrapped in: a model of this package keeps copies of some matrices meanwhile."""
    return model.decoding() if hasattr(model, "decoding") else nullcontext()


def look_closer(side: str) -> dict[str, Any]:
    """What takes no stop-watch, once a side: bits per byte, and which operators a decoded token consists of."""
    import torch

    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    model, tokenizer = LOADERS[side]()
    return {"bits": bits(model, tokenizer), **operators(model, tokenizer)}


def operators(model: Any, tokenizer: Any, tokens: int = 5) -> dict[str, Any]:
    """How many operators torch runs for a decoded token, and the three with the largest shares of their time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with torch.inference_mode(), decoding(model):
        out = model(tokenizer(TEXT, return_tensors="pt").input_ids, use_cache=True, logits_to_keep=1)

        def step() -> None:
            nonlocal out
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)

        step()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(tokens):
                step()
    found = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in found)
    shares = {e.key: round(e.self_cpu_time_total / total, 2) for e in found[:3]}
    return {"operators": sum(e.count for e in found) // tokens, "heaviest": shares}


def bits(model: Any, tokenizer: Any) -> float:
    """Bits per byte of pieces of held-out novels."""
    from aquila2_tut.data import corpus
    from aquila2_tut.evaluate import bits_per_byte, interval

    pieces = [d.text[:1200] for d in corpus("held-out", ["austen"])]
    begin = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return interval(bits_per_byte(model, tokenizer, pieces, begin=begin)).value


# --- one run ---


def write_grids(folder: str) -> None:
    """The checkpoints with 3 and 4 bits, rounded to nearest: how they were rounded makes no difference to the time."""
    from aquila2_tut import AutoLoader
    from aquila2_tut.quant import Scheme
    from aquila2_tut.quant.checkpoint import quantize_checkpoint

    loader = AutoLoader("aquila2", device="cpu", local_files_only=True)
    for width in (3, 4):
        out = Path(folder) / str(width)
        scheme = Scheme("rtn", width)
        quantize_checkpoint(loader.path, out, scheme, tokenizer=loader.get_tokenizer(), progress=False)


def in_a_process(task: str, threads: int) -> dict[str, Any]:
    """Runs this script for one task."""
    return inference.in_a_process(task, threads, Path(__file__))


def report(results: dict[str, dict[str, Any]], read: float, rounds: int, threads: int) -> None:
    """Prints the table."""
    print(f"SmolLM2-135M, {threads} threads, best of {rounds} rounds, alternating; memory read {read / 1e9:.1f} GB/s")
    head = ("weights MB", "peak MB", "prefill/s", "decode/s", "limit/s", "products", "x base", "bits/byte", "loss")
    print(f"{'':14}" + "".join(f"{name:>11}" for name in head))
    base = results[BASE]
    for side, r in results.items():
        cells = [f"{r['weight_bytes'] / 1e6:.0f}", f"{r['peak_bytes'] / 1e6:.0f}", f"{PREFILL / r['prefill']:.0f}"]
        cells += [f"{1 / r['decode']:.1f}", f"{read / r['weight_bytes']:.0f}"]
        cells += [f"{r['products'] / r['decode']:.0%}" if "products" in r else "-"]
        cells += [f"{base['decode'] / r['decode']:.2f}"]
        cells += [f"{r['bits']:.4f}", f"{r['bits'] / base['bits'] - 1:+.2%}"] if "bits" in r else ["-", "-"]
        print(f"{side:14}" + "".join(f"{cell:>11}" for cell in cells))


def save(results: dict[str, dict[str, Any]], read: float, rounds: int, threads: int, load: float) -> None:
    """Writes the file that the chapter reads; `load` is that of the machine before the first round."""
    base = results[BASE]
    sides = []
    for side, r in results.items():
        row = {"name": side, "weight_bytes": int(r["weight_bytes"]), "peak_bytes": int(r["peak_bytes"])}
        row |= {"prefill": round(PREFILL / r["prefill"], 1), "decode": round(1 / r["decode"], 1)}
        row["ratio"] = round(base["decode"] / r["decode"], 2)
        if "bits" in r:
            row |= {"bits": round(r["bits"], 4), "loss": round(r["bits"] / base["bits"] - 1, 4)}
            row |= {"products": round(r["products"] / r["decode"], 2)}
            row |= {"operators": r["operators"], "heaviest": r["heaviest"]}
        sides.append(row | {"limit": LIMITS[side]})
    facts = {
        "about": " ".join(__doc__.split("\n\n")[1].split()),
        "conditions": {
            "date": date.today().isoformat(),
            "processor": processor(),
            "threads": threads,
            "rounds": rounds,
            "bandwidth": round(read / 1e9, 1),
            "load": round(load, 2),
            "system": f"Linux {platform.machine()}" if sys.platform == "linux" else platform.platform(terse=True),
            "python": platform.python_version(),
            "model": "SmolLM2-135M (Q4_1)",
            **versions(),
        },
    }
    RESULT.write_text(json.dumps(facts | {"sides": sides}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Of all that takes part and is installed."""
    packages = ("torch", "transformers", "bitsandbytes", "torchao", "llama-cpp-python")
    return {
        name: metadata.version(name)
        for name in packages
        if importlib.util.find_spec(name.removesuffix("-python").replace("-", "_"))
    }


def processor() -> str:
    """The processor's name, and whether it has the instructions that the kernels are made for."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name = next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    return f"{name}{', AVX-512 with bfloat16' if 'avx512_bf16' in text else ''}"


def main() -> None:
    """Alternates the sides and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    parser.add_argument("--once", choices=[*SIDES, *map(CLOSER.format, SIDES), "bandwidth"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(once(args.once)))
        return
    sides = [side for side in SIDES if side in args.sides or side == BASE]
    if args.save and len(sides) < len(SIDES):
        parser.error("--save writes what one run of all sides found: leave --sides out")
    if YARDSTICK in sides and importlib.util.find_spec("llama_cpp") is None:
        print("llama.cpp is left out: pip install llama-cpp-python (it is compiled, some minutes)", file=sys.stderr)
        sides.remove(YARDSTICK)
    load = os.getloadavg()[0]
    results, read = run(sides, args.rounds, args.threads)
    report(results, read, args.rounds, args.threads)
    if args.save:
        save(results, read, args.rounds, args.threads, load)


def once(task: str) -> dict[str, Any]:
    """What a process of its own does."""
    if task == "bandwidth":
        return {"bytes_per_second": inference.bandwidth()}
    closer = {CLOSER.format(side): side for side in LOADERS}
    return look_closer(closer[task]) if task in closer else measure(task)


def run(sides: list[str], rounds: int, threads: int) -> tuple[dict[str, dict[str, Any]], float]:
    """The best of each side's figures, and the memory's bandwidth in bytes a second."""
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    reads = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ[GRID_FOLDERS] = folder
        write_grids(folder)
        for number in range(rounds):
            reads.append(in_a_process("bandwidth", threads)["bytes_per_second"])
            for side in sides:
                runs[side].append(found := in_a_process(side, threads))
                told = f"round {number + 1} of {rounds}: {side}, {1 / found['decode']:.1f} tokens/s"
                print(told, file=sys.stderr, flush=True)
        results: dict[str, dict[str, Any]] = {side: best_of(found) for side, found in runs.items()}
        for side in [side for side in sides if side in LOADERS]:
            print(f"closer: {side}", file=sys.stderr, flush=True)
            results[side] |= in_a_process(CLOSER.format(side), threads)
    return results, max(reads)


if __name__ == "__main__":
    main()
