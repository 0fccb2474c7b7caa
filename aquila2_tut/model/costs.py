"""What attention costs: arithmetic and memory traffic counted, live memory measured.

The counts are those of one forward pass, all rows and heads. They are the least that each way of computing needs, with
everything fused that can be; one divided by the other is the arithmetic intensity, which a roofline compares with what
a device can do.

Source: Dao et al. 2022 (arXiv 2205.14135), Algorithm 0 for eager attention; Williams et al. 2009
(doi 10.1145/1498765.1498785) for the roofline.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .documents import Documents, key_blocks


class Costs(NamedTuple):
    """Floating-point operations, and bytes moved between the device's memory and its processors."""

    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of one call of attention, with T queries standing at the last T of S keys.

    Args:
        batch, heads, kv_heads, queries, keys, head_dim: B, H, Hkv, T, S, D.
        bytes_each: of one number of q, k, v and the output; 2 in half precision.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    bytes_each: int = 2

    @property
    def query_bytes(self) -> int:
        """Bytes of q, and as many of the output."""
        return self.batch * self.heads * self.queries * self.head_dim * self.bytes_each

    @property
    def key_bytes(self) -> int:
        """Bytes of k, and as many of v."""
        return self.batch * self.kv_heads * self.keys * self.head_dim * self.bytes_each


def eager_costs(shape: AttentionShape) -> Costs:
    """The formula: two products over the whole T x S square, which is written and read twice, as scores and weights."""
    pairs = shape.batch * shape.heads * shape.queries * shape.keys
    inputs = 2 * shape.query_bytes + 2 * shape.key_bytes
    return Costs(4 * pairs * shape.head_dim, inputs + 4 * pairs * shape.bytes_each)


def visited_blocks(shape: AttentionShape, *, causal: bool, block: int) -> tuple[int, int]:
    """How many tiles of one head a tiled kernel computes, and how many there are.

    Causality leaves out those above the diagonal, nearly half of them.

    Args:
        shape: the sizes.
        causal: whether a query sees nothing behind itself.
        block: tokens on each side of a tile.
    """
    row = Documents(*(torch.ones(1, many, dtype=torch.int) for many in (shape.queries, shape.keys)))
    first, end = key_blocks(row, causal=causal, query_block=block, key_block=block).unbind(-1)
    return int((end - first).sum()), -(-shape.queries // block) * -(-shape.keys // block)


def tiled_costs(shape: AttentionShape, *, causal: bool, block: int) -> Costs:
    """FlashAttention: the same products, tile by tile, over the tiles that are needed; no square is written.

    Each block of queries reads the keys and values of the tiles it visits (from memory: what a cache on the way saves
    is not counted), q is read once, the output and one float32 a query are written once.

    Args:
        shape: the sizes.
        causal: whether the tiles above the diagonal are skipped.
        block: tokens on each side of a tile.
    """
    tiles = shape.batch * shape.heads * visited_blocks(shape, causal=causal, block=block)[0]
    read = 2 * tiles * block * shape.head_dim * shape.bytes_each
    logsumexp = 4 * shape.batch * shape.heads * shape.queries
    return Costs(4 * tiles * block * block * shape.head_dim, read + 2 * shape.query_bytes + logsumexp)


def has_values(x: Tensor) -> bool:
    """Whether there is something to look at: not on the meta device, and not in a rehearsal with fake tensors."""
    return type(x) is Tensor and not x.is_meta


_STANDS_FOR = ContextVar("stands_for", default="")


@contextlib.contextmanager
def standing_for(device: str) -> Iterator[None]:
    """Within the block tensors are treated as if they were on another kind of device: a rehearsal is on a CPU.

    Args:
        device: "cuda", or "" for what they are.
    """
    before = _STANDS_FOR.set(device)
    try:
        yield
    finally:
        _STANDS_FOR.reset(before)


def device_kind(x: Tensor) -> str:
    """The kind of device that a tensor is on, or stands for."""
    return _STANDS_FOR.get() or x.device.type


class _LiveBytes(TorchDispatchMode):
    """Watches every operator and adds up the tensors that are alive after it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._alive = 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # By reference, not by address: the tensors of a rehearsal have none.
        given = {StorageWeakRef(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)):
            if StorageWeakRef(storage) not in given:  # a view, or an operation in place, takes nothing new
                self._alive[StorageWeakRef(storage)] = storage.nbytes()
        self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return out


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that the tensors made during a call take at one time, gradients included.

    On any device; what existed before is not counted, nor what an operator needs inside itself and frees again.

    Args:
        call: computes something, for instance a forward and a backward pass.
    """
    with _LiveBytes() as live:
        call()
    return live.peak


def allocated_bytes(call: Callable[[], object]) -> int:
    """The most memory that torch's allocator holds at one time during a call, beyond what it held before.

    On a CPU; unlike `peak_bytes` it sees what an operator makes and frees inside itself, and the call is run twice.

    Args:
        call: computes something, for instance a forward and a backward pass.
    """
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))
