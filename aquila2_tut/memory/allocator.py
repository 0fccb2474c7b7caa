"""What CUDA's caching allocator takes from the card for a given run of allocations: more than the run ever uses.

The allocator asks the card for segments, cuts blocks from them, and keeps what is given back. A block that fits nowhere
needs a new segment though there may be enough free bytes in pieces. `nvidia-smi` shows the segments.

Source: c10/cuda/CUDACachingAllocator.cpp: kMinBlockSize, kSmallSize, kSmallBuffer, kLargeBuffer, kMinLargeAlloc,
kRoundLarge; `get_allocation_size`, `should_split`, best fit.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

from .tracker import Allocation

_MIB = 2**20
_SMALL, _SMALL_SEGMENT = _MIB, 2 * _MIB  # what is at most 1 MiB lies in segments of 2 MiB
_LARGE, _LARGE_SEGMENT, _ROUND_LARGE = 10 * _MIB, 20 * _MIB, 2 * _MIB  # below 10 MiB in segments of 20 MiB


@dataclass(eq=False)
class _Block:
    """A piece of a segment, with its neighbours."""

    size: int
    pool: list[_Block]
    free: bool = False
    before: _Block | None = None
    after: _Block | None = None


class CachingAllocator:
    """The allocator, with the sizes of blocks and without their addresses.

    Attributes:
        reserved: bytes of all segments.
    """

    def __init__(self) -> None:
        self.reserved = 0
        self._small: list[_Block] = []
        self._large: list[_Block] = []

    def allocate(self, size: int) -> _Block:
        """A block of at least so many bytes, from the smallest free one that holds them."""
        pool = self._small if size <= _SMALL else self._large
        at = bisect.bisect_left(pool, size, key=lambda block: block.size)
        block = pool.pop(at) if at < len(pool) else self._segment(size, pool)
        rest = block.size - size
        if rest >= 512 if pool is self._small else rest > _SMALL:
            block.size = size
            other = _Block(rest, pool, before=block, after=block.after)
            if block.after:
                block.after.before = other
            block.after = other
            self._put_back(other)
        block.free = False
        return block

    def _segment(self, size: int, pool: list[_Block]) -> _Block:
        if size <= _SMALL:
            whole = _SMALL_SEGMENT
        else:
            whole = _LARGE_SEGMENT if size < _LARGE else -(-size // _ROUND_LARGE) * _ROUND_LARGE
        self.reserved += whole
        return _Block(whole, pool)

    def free(self, block: _Block) -> None:
        """Takes a block back, and joins it with free neighbours."""
        if block.before and block.before.free:
            self._take_out(block.before)
            block = _joined(block.before, block)
        if block.after and block.after.free:
            self._take_out(block.after)
            block = _joined(block, block.after)
        self._put_back(block)

    def _put_back(self, block: _Block) -> None:
        block.free = True
        bisect.insort(block.pool, block, key=lambda block: block.size)

    def _take_out(self, block: _Block) -> None:
        at = bisect.bisect_left(block.pool, block.size, key=lambda block: block.size)
        while block.pool[at] is not block:
            at += 1
        del block.pool[at]


def _joined(first: _Block, second: _Block) -> _Block:
    first.size += second.size
    first.after = second.after
    if second.after:
        second.after.before = first
    return first


def reserved_bytes(allocations: Iterable[Allocation], moments: int, steps: int = 2) -> int:
    """What the allocator has taken from the card after some equal steps.

    Args:
        allocations: of a step, in the order in which they were made.
        moments: operators of a step.
        steps: how often it is run; what was there before it stays.
    """
    allocator, allocations = CachingAllocator(), list(allocations)
    blocks = {id(a): allocator.allocate(a.bytes) for a in allocations if a.birth == 0 and a.bytes}
    born: list[list[Allocation]] = [[] for _ in range(moments + 2)]
    gone: list[list[Allocation]] = [[] for _ in range(moments + 2)]
    for allocation in allocations:
        if allocation.birth and allocation.bytes:
            born[allocation.birth].append(allocation)
            gone[min(moments + 1, allocation.death or moments + 1)].append(allocation)
    for _ in range(steps):
        for at in range(1, moments + 2):
            for allocation in gone[at]:
                allocator.free(blocks.pop(id(allocation)))
            for allocation in born[at]:
                blocks[id(allocation)] = allocator.allocate(allocation.bytes)
    return allocator.reserved
