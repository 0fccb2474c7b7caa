"""Graphics cards and their connections: what data sheets promise, and how much memory a program gets to see."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

_MIB = 2**20


@dataclass(frozen=True)
class GPU:
    """One card.

    Args:
        name: of the card.
        memory: bytes on the card. What sheets call "24 GB" is 24 GiB: memory chips come in powers of two.
        usable: bytes that the driver shows to programs. The rest is `withheld`.
        flops: dense 16-bit operations a second on the tensor cores, summed in float32.
        bandwidth: of the memory, bytes a second.
        cache: of the L2 cache, bytes.
        capability: CUDA compute capability; from (8, 0) on, bfloat16 is done in hardware.
        source: where the figures are published.
    """

    name: str
    memory: int
    usable: int
    flops: float
    bandwidth: float
    cache: float
    capability: tuple[int, int]
    source: str

    @property
    def withheld(self) -> int:
        """Bytes that no program sees: error correction where it lies in the memory itself, and the firmware's share."""
        return self.memory - self.usable

    @property
    def ridge(self) -> float:
        """Operations a byte from which arithmetic limits, and no longer memory."""
        return self.flops / self.bandwidth

    def least_seconds(self, flops: float, moved: float) -> float:
        """No program that computes `flops` operations and moves `moved` bytes can be faster than this."""
        return max(flops / self.flops, moved / self.bandwidth)


@dataclass(frozen=True)
class Link:
    """A connection of cards or machines.

    Args:
        name: of the kind of connection.
        bandwidth: bytes a second, each direction; for a network, of one port.
        source: where it is published.
    """

    name: str
    bandwidth: float
    source: str


_TABLES = json.loads(resources.files(__package__).joinpath("hardware.json").read_text(encoding="utf-8"))


def _gpu(memory_gib: int, usable_mib: int, capability: list[int], **rest: object) -> GPU:
    return GPU(memory=memory_gib * 1024 * _MIB, usable=usable_mib * _MIB, capability=tuple(capability), **rest)


GPUS: dict[str, GPU] = {row["name"]: _gpu(**row) for row in _TABLES["gpus"]}
LINKS: dict[str, Link] = {row["name"]: Link(**row) for row in _TABLES["links"]}
