"""Costs of attention: counts against brute force, and memory measured at growing lengths."""

from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from aquila2_tut.model import attention
from aquila2_tut.model.attention import triton_obstacle
from aquila2_tut.model.costs import (
    AttentionShape,
    allocated_bytes,
    eager_costs,
    peak_bytes,
    tiled_costs,
    visited_blocks,
)

NO_TRITON = triton_obstacle(torch.ones(1, 1, 1, 1))
LENGTHS = (128, 256, 512)


def forward_backward(backend: str, length: int):
    """A call that computes the output and the gradients; two heads share keys."""
    q = torch.randn(1, 2, length, 32, requires_grad=True)
    k = torch.randn(1, 1, length, 32, requires_grad=True)

    def call() -> None:
        torch.autograd.grad(attention(q, k, k, causal=True, backend=backend).sum(), (q, k))

    return call


def growth(bytes_at: list[int]) -> list[float]:
    return [b / a for a, b in pairwise(bytes_at)]


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_memory_grows_with_the_length(backend):
    if backend == "triton" and NO_TRITON:
        pytest.skip(NO_TRITON)
    factors = growth([peak_bytes(forward_backward(backend, length)) for length in LENGTHS])
    assert all(1.9 <= factor <= 2.1 for factor in factors), factors


def test_memory_of_the_formula_grows_with_its_square():
    factors = growth([peak_bytes(forward_backward("eager", length)) for length in LENGTHS])
    assert all(3.7 <= factor <= 4.1 for factor in factors), factors


@pytest.mark.parametrize(("backend", "low", "high"), [("sdpa", 1.8, 2.5), ("eager", 3.7, 4.1)])
def test_the_allocator_agrees(backend, low, high):
    """torch's profiler sees every allocation, also those that an operator makes and frees inside itself."""
    factors = growth([allocated_bytes(forward_backward(backend, length)) for length in LENGTHS])
    assert all(low <= factor <= high for factor in factors), factors


def test_peak_bytes_counts_what_is_alive():
    x = torch.ones(1000)
    assert peak_bytes(lambda: x + 1) == 4000
    assert peak_bytes(lambda: [x + 1, x + 2]) == 8000
    assert peak_bytes(lambda: (x + 1).sum()) == 4004
    assert peak_bytes(lambda: x.view(10, 100)[2:]) == 0
    assert peak_bytes(lambda: [(x + 1).sum() for _ in range(5)]) == 4020


def test_the_bytes_of_a_rehearsal_are_those_of_the_real_thing():
    with FakeTensorMode():
        rehearsed = peak_bytes(forward_backward("eager", 64))
    assert rehearsed == peak_bytes(forward_backward("eager", 64)) > 0


def test_visited_blocks_are_counted():
    shape = AttentionShape(1, 1, 1, 300, 300, 64)
    seen = torch.ones(300, 300).tril()
    tiles = [part for rows in seen.split(64) for part in rows.split(64, dim=1)]
    assert visited_blocks(shape, causal=True, block=64) == (sum(bool(t.any()) for t in tiles), len(tiles)) == (15, 25)
    assert visited_blocks(shape, causal=False, block=64) == (25, 25)
    assert visited_blocks(AttentionShape(1, 1, 1, 1, 300, 64), causal=True, block=64) == (5, 5)


def test_costs_of_the_formula():
    """Hand count for one head of 2 queries and 3 keys of 4 numbers, 2 bytes each."""
    costs = eager_costs(AttentionShape(1, 1, 1, 2, 3, 4))
    assert costs.flops == 2 * (2 * 2 * 3 * 4)
    assert costs.bytes == 2 * (2 * 4 + 2 * 3 * 4 + 2 * 4) + 4 * 2 * (2 * 3)
    assert costs.intensity == costs.flops / costs.bytes


def test_costs_of_tiles():
    shape = AttentionShape(2, 4, 2, 128, 128, 64)
    full = tiled_costs(shape, causal=False, block=64)
    assert full.flops == eager_costs(shape).flops
    assert full.bytes == 2 * (8 * 2 * 2 * 2 * 64 * 64) + 2 * (2 * 4 * 128 * 64 * 2) + 4 * 2 * 4 * 128
    assert tiled_costs(shape, causal=True, block=64).flops == full.flops * 3 // 4
    long = AttentionShape(1, 32, 32, 4096, 4096, 128)
    assert tiled_costs(long, causal=False, block=128).intensity > 1.5 * eager_costs(long).intensity
