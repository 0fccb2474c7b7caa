"""The loss of a language model: the plain way, torch's chunked one, chunks under checkpointing, and ours, turn by turn.

Measures forward and backward pass together, with a head that is trained or frozen, and the most bytes that torch's
allocator holds at one time. SmolLM2's width, the vocabularies of three sizes up to Aquila2's 100,008. Every side gets
one turn a round; the best of its turns counts, because what disturbs a measurement only ever makes it longer. Ratios
are to the plain way: below 1 is better.

"recomputed" is the other way to keep no logits: chunks that the backward pass computes a second time. torch's side
needs a torch that has `linear_cross_entropy`. At the end stands a step of 4 x 2,048 tokens at the widths of SmolLM2 and
of Aquila2-7B, rehearsed with tensors that have a size but no values.

    python benchmarks/loss.py [--rounds 3] [--threads 2] [--vocabularies 8192 49152 100008] [--tokens 512 2048]

What the profiler says about starting and stopping goes to stderr.
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from aquila2_tut.model.costs import allocated_bytes, peak_bytes
from aquila2_tut.train import chunked_cross_entropy

PEER, WIDTH, CHUNK = "plain", 576, 128
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def plain(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def torchs(hidden, weight, labels):
    return F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


def recomputed(hidden, weight, labels):
    def part(x, y):
        return F.cross_entropy(F.linear(x, weight).float(), y, reduction="sum")

    chunks = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    return sum(checkpoint(part, x, y, use_reentrant=False) for x, y in chunks) / len(labels)


SIDES = {PEER: plain, "torch chunked": torchs, "recomputed": recomputed, "ours": chunked_cross_entropy}
if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
    del SIDES["torch chunked"]


def inputs(tokens: int, vocabulary: int, dtype: torch.dtype, frozen: bool, width: int = WIDTH) -> tuple:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width) / 10).to(dtype).requires_grad_(not frozen)
    return hidden, weight, torch.randint(vocabulary, (tokens,))


def step(side, given: tuple) -> list[torch.Tensor]:
    """The loss and the gradients of what is trained."""
    value = side(*given)
    return [value.detach(), *torch.autograd.grad(value, [x for x in given[:2] if x.requires_grad])]


def seconds(side, given: tuple, clock) -> float:
    start = clock()
    step(side, given)
    return clock() - start


def check(sides: dict, given: tuple) -> None:
    """Nobody is fast by computing something else."""
    wanted, half = step(plain, given), given[0].dtype != torch.float32
    for name, side in sides.items():
        for i, (a, b) in enumerate(zip(step(side, given), wanted, strict=True)):
            # torch's chunked loss, not its gradients, is off by 4 % in half precision.
            within = 1e-4 if not half else 0.02 if i else 0.06
            assert float((a.float() - b.float()).norm()) <= within * float(b.float().norm()), f"{name} is wrong"


def measure(sides: dict, given: tuple, rounds: int, clock) -> dict[str, tuple[float, int]]:
    """Side to (seconds, peak bytes)."""
    check(sides, given)
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, side in sides.items():
            best[name] = min(best[name], seconds(side, given, clock))
    return {name: (best[name], allocated_bytes(lambda s=side: step(s, given))) for name, side in sides.items()}


def report(given: tuple, results: dict[str, tuple[float, int]]) -> None:
    (tokens, vocabulary), dtype = (len(x) for x in given[:2]), given[0].dtype
    head = "trained" if given[1].requires_grad else "frozen"
    for name, row in results.items():
        ratio = [mine / peer for mine, peer in zip(row, results[PEER], strict=True)]
        what = f"{vocabulary:>8}{tokens:>7}  {head:9}{str(dtype).removeprefix('torch.'):10}"
        times = f"{row[0] * 1e3:8.0f}{ratio[0]:7.2f}{row[1] / 2**20:10.0f}{ratio[1]:7.2f}"
        print(f"{what}{name:14}{times}", flush=True)


def rehearse(side, width: int, dtype: torch.dtype, frozen: bool) -> int:
    """Peak bytes for 4 x 2,048 tokens and Aquila2's vocabulary."""
    with FakeTensorMode():
        given = inputs(4 * 2048, 100_008, dtype, frozen, width)
        return peak_bytes(lambda: step(side, given))


def report_rehearsals() -> None:
    print("\n4 x 2,048 tokens, vocabulary 100,008, rehearsed: peak GiB, gradients included")
    print(f"{'width':>8}  {'head':9}{'type':10}{'plain':>8}{'ours':>8}{'ratio':>7}")
    for width, dtype, frozen in itertools.product((576, 4096), (torch.float32, torch.bfloat16), (True, False)):
        theirs, ours = (rehearse(side, width, dtype, frozen) for side in (plain, chunked_cross_entropy))
        what = f"{width:>8}  {'frozen' if frozen else 'trained':9}{str(dtype).removeprefix('torch.'):10}"
        print(f"{what}{theirs / 2**30:8.2f}{ours / 2**30:8.2f}{ours / theirs:7.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 49152, 100_008])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help=f"{PEER} is always among them")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu, with one thread, where others compute too"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"width {WIDTH}, {args.threads} threads; best of {args.rounds} by the {args.clock} clock")
    print(f"{'vocab':>8}{'tokens':>7}  {'head':9}{'type':10}{'':14}{'ms':>8}{'ratio':>7}{'peak MiB':>10}{'ratio':>7}")
    sides = {name: side for name, side in SIDES.items() if name in (PEER, *args.sides)}
    types = (torch.float32, torch.bfloat16)
    for sizes in itertools.product(args.vocabularies, args.tokens, types, (True, False)):
        given = inputs(sizes[1], sizes[0], *sizes[2:])
        report(given, measure(sides, given, args.rounds, CLOCKS[args.clock]))
    report_rehearsals()


if __name__ == "__main__":
    main()
