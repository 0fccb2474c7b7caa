"""What it takes to read a long prompt: in one piece or in pieces, and with caches of several types.

SmolLM2-135M in float32 reads 8,192 tokens of a novel by Jane Austen. Each way runs in a process of its own, where two
figures are taken: the resident set, every 2 ms, beyond what it was with the model loaded; and the bytes of all tensors
that are alive. Neither counts the weights, which are the same for all. The first way scores every position, as
`model(ids)` does, the second the last one only, as `generate` does; the others are `prefill`.

    python benchmarks/long_memory.py [--tokens 8192] [--chunk 512] [--bits 2048]

Prints the ratio to the first two, how far the last position's logits are from the first way's, and for each type of
cache the bits that a token of a text takes, read in pieces through that cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from inference import Peak, load_ours, resident
from torch.nn import functional as F

from aquila2_tut.chat import prefill
from aquila2_tut.data.corpora import documents
from aquila2_tut.memory import cache_bytes_per_token
from aquila2_tut.model.cache import make_cache
from aquila2_tut.model.costs import peak_bytes

WHOLE, LAST = "one piece, all logits", "one piece, last logits"
TYPES = ("float32", "bfloat16", "int8")


def ways(model, ids: torch.Tensor, chunk: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Each reads the prompt and returns the last position's logits (V,)."""

    def in_pieces(stored: str) -> torch.Tensor:
        return prefill(model, ids, chunk, make_cache(stored, ids.shape[1])).logits[0, -1]

    return {
        WHOLE: lambda: model(ids, use_cache=True).logits[0, -1],
        LAST: lambda: model(ids, use_cache=True, logits_to_keep=1).logits[0, -1],
        **{f"pieces of {chunk}, {stored}": lambda stored=stored: in_pieces(stored) for stored in TYPES},
    }


def prompt(tokenizer, tokens: int) -> torch.Tensor:
    text = "\n\n".join(chapter.text for chapter in itertools.islice(documents("austen"), 1 + tokens // 500))
    ids = torch.tensor([tokenizer.encode(text)[:tokens]])
    if ids.shape[1] < tokens:
        raise SystemExit(f"the text has only {ids.shape[1]} tokens")
    return ids


@torch.inference_mode()
def measure(way: str, tokens: int, chunk: int) -> dict:
    """One way, in this process."""
    model, tokenizer = load_ours("float32")
    ids = prompt(tokenizer, tokens)
    ways(model, ids[:, :600], chunk)[way]()  # what is loaded at the first call is no part of it
    before = resident()
    found: list[torch.Tensor] = []
    with Peak() as peak:
        live = peak_bytes(lambda: found.append(ways(model, ids, chunk)[way]()))
    return {"resident": peak.bytes - before, "live": live, "logits": found[0].tolist()}


@torch.inference_mode()
def bits(stored: str, tokens: int) -> dict:
    """Bits a token of the text after its first, read in pieces of 128 through a cache."""
    model, tokenizer = load_ours("float32")
    ids, cache = prompt(tokenizer, tokens), make_cache(stored, tokens)
    total, last = 0.0, None
    for piece in ids.split(128, dim=1):
        logits = model(piece, past_key_values=cache, use_cache=True).logits[0]
        before = logits[:-1] if last is None else torch.cat((last, logits[:-1]))
        total += F.cross_entropy(before, piece[0, 1:] if last is None else piece[0], reduction="sum").item()
        last = logits[-1:]
    return {"bits": total / (tokens - 1) / 0.6931471805599453}


def in_a_process(*arguments: object) -> dict:
    command = [sys.executable, str(Path(__file__)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(tokens: int, chunk: int) -> None:
    """Prints the table of bytes."""
    names = (WHOLE, LAST, *(f"pieces of {chunk}, {stored}" for stored in TYPES))
    print(f"{tokens} tokens, SmolLM2-135M in float32; MB beyond the weights, and times the first two ways")
    found: dict[str, dict] = {}
    for name in names:
        found[name] = in_a_process("--once", name, "--tokens", tokens, "--chunk", chunk)
        one, first, second = found[name], found[WHOLE], found.get(LAST)
        cells = ""
        for kind in ("live", "resident"):
            against = f"x{one[kind] / first[kind]:.2f}" + (f" x{one[kind] / second[kind]:.2f}" if second else "")
            cells += f"  {kind} {one[kind] / 1e6:7.0f} {against:12}"
        apart = max(abs(a - b) for a, b in zip(one["logits"], first["logits"], strict=True))
        print(f"{name:24}{cells}  logits {apart:.1e} apart", flush=True)


def main() -> None:
    """Takes one way after the other and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--bits", type=int, default=2048, help="tokens of the text whose bits are counted")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.once:
        print(
            json.dumps(
                bits(args.once, args.bits) if args.once in TYPES else measure(args.once, args.tokens, args.chunk)
            )
        )
        return
    report(args.tokens, args.chunk)
    config = load_ours("float32")[0].config
    plain = None
    for stored in TYPES:
        found = in_a_process("--once", stored, "--bits", args.bits)["bits"]
        plain = plain or found
        size = cache_bytes_per_token(config, stored)
        print(
            f"cache in {stored:10}{size:7} bytes a token{found:9.4f} bits a token  {found / plain - 1:+.3%}", flush=True
        )


if __name__ == "__main__":
    main()
