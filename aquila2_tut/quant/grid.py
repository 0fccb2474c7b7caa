"""Weights on even grids, one grid for each group of columns in a row: rounding to nearest, and the linear map with it.

A row of a group has the levels step * (code - zero), with codes from 0 to 2^bits - 1. Steps are stored in float16 and
zeros in the bits of a code, as GPTQ checkpoints have them, so other programs read what is written here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.costs import has_values
from .errors import QuantError, refuse_non_finite
from .linear import QuantizedLinear
from .packing import pack, unpack

_SMALLEST_STEP = 2.0**-24  # of float16


@dataclass(frozen=True)
class Grid:
    """Evenly spaced levels, other ones for each row: step * (code - zero), codes from 0 to 2^bits - 1.

    Args:
        step: (..., 1) float32, a number that float16 has as well.
        zero: (..., 1) float32, a whole number: the code of 0, so that 0 is exact.
        bits: of a code.
    """

    step: Tensor
    zero: Tensor
    bits: int

    @classmethod
    def around(cls, weight: Tensor, bits: int) -> Grid:
        """The grid from the smallest to the largest of each row. weight: (..., columns)."""
        if not 1 < bits <= 8:
            raise QuantError(f"from 2 to 8 bits, not {bits}")
        low, high = (x.float() for x in weight.aminmax(dim=-1, keepdim=True))
        low, high = low.clamp(max=0), high.clamp(min=0)
        step = ((high - low) / (2**bits - 1)).clamp(min=_SMALLEST_STEP).half().float()
        if has_values(step) and not bool(step.isfinite().all()):
            refuse_non_finite(weight, step)
            largest = float(torch.maximum(high, -low).max())
            raise QuantError(f"a weight of magnitude {largest:.3g} is too large for steps in float16 with {bits} bits")
        return cls(step, (-low / step).round().clamp(0, 2**bits - 1), bits)

    def codes(self, weight: Tensor) -> Tensor:
        """The codes of the nearest levels, in float32. weight: (..., columns)."""
        return (weight / self.step + self.zero).round().clamp(0, 2**self.bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        """The levels of codes: (..., columns), in float32."""
        return self.step * (codes - self.zero)


@dataclass(frozen=True)
class GridTensor:
    """A weight in codes.

    Args:
        codes: (out, in) uint8.
        steps: (out, groups) float32, numbers that float16 has as well.
        zeros: (out, groups) float32, whole numbers.
        bits: of a code.
        group: columns that share a grid; the last group may be smaller.
    """

    codes: Tensor
    steps: Tensor
    zeros: Tensor
    bits: int
    group: int

    @classmethod
    def of_groups(cls, codes: list[Tensor], grids: list[Grid], group: int) -> GridTensor:
        """Puts the groups of a weight together, (out, up to `group`) each."""
        steps, zeros = (torch.cat([getattr(grid, name) for grid in grids], 1) for name in ("step", "zero"))
        return cls(torch.cat(codes, 1).to(torch.uint8), steps, zeros, grids[0].bits, group)

    def values(self) -> Tensor:
        """The weight that the codes stand for, (out, in) in float32."""
        at = torch.arange(self.codes.shape[1], device=self.codes.device) // self.group
        return self.steps[:, at] * (self.codes - self.zeros[:, at])


def round_to_nearest(weight: Tensor, bits: int = 4, group: int = 128) -> GridTensor:
    """Each weight at the nearest level of its group.

    Args:
        weight: (out, in).
        bits: of a code.
        group: columns that share a grid, in each row; the last group may be smaller.

    Raises:
        QuantError: a number that is not finite, or a number of bits that there is no grid for.
    """
    refuse_non_finite(weight, weight.detach().float().abs().amax(0))
    parts = weight.detach().float().split(group, 1)
    grids = [Grid.around(part, bits) for part in parts]
    return GridTensor.of_groups([g.codes(part) for g, part in zip(grids, parts, strict=True)], grids, group)


def fitting_group(widths: set[int], largest: int = 128) -> int:
    """The largest group of a power of two that divides the inputs of every layer.

    Args:
        widths: the inputs that layers have.
        largest: the group to begin with.
    """
    while largest > 1 and any(width % largest for width in widths):
        largest //= 2
    return largest


class GridLinear(QuantizedLinear):
    """A linear map whose frozen weights are on even grids, stored as a GPTQ checkpoint stores them.

    Args:
        linear: gives the sizes, the weights' type and the bias.
        bits: of a code.
        group: columns that share a grid.
        weight: the codes, (out, in); without them the layer is empty, to be filled with `load_state_dict`.
    """

    def __init__(self, linear: nn.Linear, bits: int, group: int, weight: GridTensor | None = None) -> None:
        super().__init__(linear, _stored(weight) if weight else _unfilled(linear, bits, group))
        self.bits, self.group = bits, group

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (in, out) uint8, steps (groups, out) float16 and zeros (groups, out) uint8."""
        return unpack(self.qweight, self.bits), self.scales, unpack(self.qzeros.t(), self.bits).t()

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as numbers."""
        codes, steps, zeros = self.codes()
        at = self.g_idx
        weight = (codes.to(torch.int16) - zeros[at]) * steps.float()[at]
        return weight.to(dtype).t()

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return f"{super().extra_repr()}, bits={self.bits}, group={self.group}"


def _stored(weight: GridTensor) -> dict[str, Tensor]:
    """The tensors of a GPTQ checkpoint."""
    index = torch.arange(weight.codes.shape[1], device=weight.codes.device) // weight.group
    return {
        "qweight": pack(weight.codes.t(), weight.bits),
        "qzeros": pack(weight.zeros.to(torch.uint8), weight.bits).t().contiguous(),
        "scales": weight.steps.t().contiguous().half(),
        "g_idx": index.to(torch.int32),
    }


def _unfilled(linear: nn.Linear, bits: int, group: int) -> dict[str, Tensor]:
    """Tensors of the right sizes, on the device of `linear`, to be replaced by those of a checkpoint."""
    out, width = linear.weight.shape
    groups = -(-width // group)
    sizes = {
        "qweight": ((width * bits // 32, out), torch.int32),
        "qzeros": ((groups, out * bits // 32), torch.int32),
        "scales": ((groups, out), torch.float16),
        "g_idx": ((width,), torch.int32),
    }
    return {name: linear.weight.new_empty(shape, dtype=dtype) for name, (shape, dtype) in sizes.items()}
