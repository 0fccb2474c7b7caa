"""Training on several devices: what lies on each of them, and what goes over the wire in a step.

Counted are the three kinds of state that sharding is about: weights, gradients, and the optimizer's state. Activations
belong to a device's own rows whatever is sharded.

Source: Rajbhandari et al. 2020, "ZeRO" (arXiv 1910.02054), sections 5 and 7; where these runs keep other types than the
paper, as DeepSpeed 0.19 and FSDP2 of torch 2.13 were seen to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

STRATEGIES = ("copies", "zero1", "zero2", "zero3", "fsdp2")
_FLOAT, _HALF = 4, 2  # bytes of a number
# Of the three kinds of state, which are split. The rest lies on every device as a whole.
SPLIT = {
    "copies": (False, False, False),
    "zero1": (False, False, True),
    "zero2": (False, True, True),
    "zero3": (True, True, True),
    "fsdp2": (True, True, True),
}


@dataclass(frozen=True)
class Held:
    """Bytes on one device.

    Args:
        weights: what learns and what does not.
        gradients: of what learns.
        optimizer: two averages for AdamW, and under ZeRO the float32 copy of the weights.
    """

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """All three."""
        return self.weights + self.gradients + self.optimizer


def held_bytes(strategy: str, devices: int, trained: int, frozen: int = 0) -> Held:
    """What lies on one device, with products in bfloat16 and AdamW.

    Copies and FSDP2 keep weights and gradients in float32 and two averages beside: 4 + 4 + 8 bytes. ZeRO keeps both in
    16 bits, and a float32 copy of the weights with the averages: 2 + 2 + 12. The sum is the same, the parts are not.

    Args:
        strategy: one of `STRATEGIES`.
        devices: how many share the work.
        trained: weights that learn.
        frozen: bytes of weights that do not.
    """
    number = _HALF if strategy.startswith("zero") else _FLOAT
    whole = (frozen + number * trained, number * trained, (16 - 2 * number) * trained)
    return Held(*(size / devices if split else size for size, split in zip(whole, SPLIT[strategy], strict=True)))


def sent_bytes(
    strategy: str, devices: int, trained: int, frozen: int = 0, kept: int = 0, number: int | None = None
) -> float:
    """What one device sends in a step of one batch, if the devices stand in a ring.

    In a ring of N, gathering or scattering S bytes takes N - 1 rounds, and in each a device sends one part of S / N.
    Reducing to all is a scatter and a gather: 2 (N - 1) / N times S. Copies reduce the gradients to all. ZeRO-1 and
    ZeRO-2 scatter the gradients and gather the new weights, which is as much. ZeRO-3 and FSDP2 gather all weights
    twice, before the forward and before the backward pass, and scatter the gradients: half as much again.

    Args:
        strategy: one of `STRATEGIES`.
        devices: N.
        trained: weights that learn.
        frozen: bytes of weights that do not.
        kept: bytes of weights that stay gathered between the two passes, as FSDP2 keeps the head.
        number: bytes of a number on its way; None for float32 gradients of copies, and 16 bits otherwise.

    Source: section 7 of the paper; the ring: Patarasuk and Yuan 2009.
    """
    number = number or (_FLOAT if strategy == "copies" else _HALF)
    share, gradients = (devices - 1) / devices, number * trained
    if strategy in ("zero3", "fsdp2"):
        return share * (2 * (frozen + gradients) - kept + gradients)
    return share * 2 * gradients


class _Collectives(TorchDispatchMode):
    """Adds up the bytes of each kind of collective operation, without its padding."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d" and (name := _KINDS.get(func.overloadpacket.__name__)):
            tensors = [x for arg in args[:2] for x in (arg if isinstance(arg, list | tuple) else [arg])]
            largest = max(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
            self.bytes[name] = self.bytes.get(name, 0) + largest
        return func(*args, **(kwargs or {}))


_KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}


@contextmanager
def collectives() -> Iterator[dict[str, int]]:
    """Notes the collective operations of a block of code in this process.

    Yields:
        Kind -> bytes of the whole tensors: reduced, gathered or scattered. Filled while the block runs.
    """
    with _Collectives() as seen:
        yield seen.bytes
