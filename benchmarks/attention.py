"""Attention on a CPU: our sdpa and eager backends against transformers' own, in one run, turn by turn.

SmolLM2's shapes: 9 query heads that share 3 key-value heads of 64 dimensions, one row, causal, float32. Measures the
forward pass alone and forward and backward together, and counts the most bytes that are alive at one time. Every side
gets one turn a round; the best of its turns counts, because what disturbs a measurement only ever makes it longer.

The triton backend is left out: without a GPU it runs in an interpreter, and its time says nothing.

    python benchmarks/attention.py [--rounds 15] [--threads 2] [--lengths 512 1024 2048]
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from aquila2_tut.model import attention
from aquila2_tut.model.costs import AttentionShape, eager_costs, peak_bytes

HEADS, KV_HEADS, DIM = 9, 3, 64
PEER = "transformers sdpa"


def transformers_side(function, mask):
    """One of transformers' attention functions, called as its LlamaAttention calls it."""
    layer = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, is_causal=True, training=False)
    return lambda q, k, v: function(layer, q, k, v, mask, scaling=DIM**-0.5)[0]


def our_side(backend: str):
    return lambda q, k, v: attention(q, k, v, causal=True, backend=backend).transpose(1, 2)


def sides(length: int) -> dict:
    """Each side makes (B, T, H, D) of q, k and v. The mask that transformers makes once for all layers is given."""
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    return {
        PEER: transformers_side(ALL_ATTENTION_FUNCTIONS["sdpa"], None),
        "ours sdpa": our_side("sdpa"),
        "transformers eager": transformers_side(eager_attention_forward, mask),
        "ours eager": our_side("eager"),
    }


def inputs(length: int) -> list[torch.Tensor]:
    """q, k and v as a layer makes them: (B, T, H, D) seen as (B, H, T, D)."""
    torch.manual_seed(0)
    shapes = [(1, length, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape).transpose(1, 2).requires_grad_() for shape in shapes]


def forward(side, tensors: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return side(*tensors)


def forward_backward(side, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(side(*tensors).sum(), tensors)


def seconds(task, side, tensors: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    task(side, tensors)
    return time.perf_counter() - start


def check(found: dict, tensors: list[torch.Tensor]) -> None:
    """Nobody is fast by computing something else."""
    wanted = [forward(found[PEER], tensors), *forward_backward(found[PEER], tensors)]
    for side in found.values():
        for a, b in zip([forward(side, tensors), *forward_backward(side, tensors)], wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def measure(length: int, rounds: int) -> dict[str, tuple[float, float, int]]:
    """Side to (seconds forward, seconds forward and backward, peak bytes)."""
    found, tensors = sides(length), inputs(length)
    check(found, tensors)
    best = {name: [float("inf")] * 2 for name in found}
    for _ in range(rounds):
        for name, side in found.items():
            turn = [seconds(task, side, tensors) for task in (forward, forward_backward)]
            best[name] = [min(pair) for pair in zip(best[name], turn, strict=True)]
    return {
        name: (*best[name], peak_bytes(lambda s=side: forward_backward(s, tensors))) for name, side in found.items()
    }


def report(length: int, results: dict[str, tuple[float, float, int]]) -> None:
    flops = eager_costs(AttentionShape(1, HEADS, KV_HEADS, length, length, DIM, 4)).flops
    print(f"\n{length} tokens ({flops / 1e9:.1f} GFLOP forward, without skipping); ratio to {PEER}: below 1 is better")
    print(f"{'':20}{'forward ms':>11}{'ratio':>7}{'fwd+bwd ms':>12}{'ratio':>7}{'peak MiB':>10}{'ratio':>7}")
    for name, row in results.items():
        ratio = [mine / peer for mine, peer in zip(row, results[PEER], strict=True)]
        times = "".join(f"{row[i] * 1e3:{width}.1f}{ratio[i]:7.2f}" for i, width in ((0, 11), (1, 12)))
        print(f"{name:20}{times}{row[2] / 2**20:10.1f}{ratio[2]:7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{HEADS} heads, {KV_HEADS} key-value heads, D {DIM}, float32, {args.threads} threads; best of {args.rounds}")
    for length in args.lengths:
        report(length, measure(length, args.rounds))


if __name__ == "__main__":
    main()
