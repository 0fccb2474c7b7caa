"""Four bits a weight at the speed of a CPU's memory: a grid's codes in the order that torch's own kernel reads.

Decoding reads every weight once a token, so a quarter of the bytes is most of a quarter of the time, as long as nothing
is written in between: the kernel makes numbers of the codes inside the product. `benchmarks/quantized_decode.py` shows
what that gains.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .grid import GridLinear
from .linear import QuantizedLinear

_GROUPS = (32, 64, 128, 256)  # of the kernel
_MIDDLE = 8  # the kernel's levels are step * (code - 8) + offset


@functools.cache
def kernel_works() -> bool:
    """Whether this torch has the kernel, and gets a product right here."""
    codes = torch.arange(32 * 64, dtype=torch.int32).view(64, 32) % 16
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        ones = torch.ones(1, 64, 2, dtype=torch.bfloat16)
        found = torch.ops.aten._weight_int4pack_mm_for_cpu(torch.eye(32, dtype=torch.bfloat16), packed, 32, ones)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.equal(found, (codes.t() - 7).to(torch.bfloat16))


class Int4Linear(QuantizedLinear):
    """A linear map with four-bit codes for bfloat16 numbers on a CPU, made of a `GridLinear`.

    A weight is step * code + offset. Other types of input are multiplied with the dequantized weight.

    Args:
        linear: gives the sizes, the weights' type and the bias.
        codes: (out, in), from 0 to 15.
        steps, offsets: (out, groups), of each group of columns; they are rounded to bfloat16.
    """

    def __init__(self, linear: nn.Linear | QuantizedLinear, codes: Tensor, steps: Tensor, offsets: Tensor) -> None:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1)
        levels = torch.stack([steps.float(), offsets.float() + _MIDDLE * steps.float()], -1)
        super().__init__(linear, {"packed": packed, "levels": levels.transpose(0, 1).to(torch.bfloat16).contiguous()})
        self.group = linear.in_features // steps.shape[1]

    @classmethod
    def of_grid(cls, layer: GridLinear) -> Int4Linear:
        """The same codes in the kernel's order; see `fits`."""
        codes, steps, zeros = layer.codes()
        return cls(layer, codes.t(), steps.t(), (-steps.float() * zeros).t())

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Whether the kernel can take a layer: four bits, its group sizes, columns in order, bfloat16 on a CPU."""
        if not isinstance(layer, GridLinear) or layer.bits != 4 or layer.dtype != torch.bfloat16:
            return False
        width, group = layer.in_features, layer.group
        in_order = torch.equal(layer.g_idx.cpu(), torch.arange(width, dtype=torch.int32) // group)
        whole = group in _GROUPS and width % group == 0 and layer.out_features % 16 == 0
        return whole and in_order and layer.qweight.is_cpu and kernel_works()

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as numbers: what the kernel makes of the unit matrix."""
        unit = torch.eye(self.in_features, dtype=torch.bfloat16)
        return self._kernel(unit).t().to(dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """x W^T: (..., in) -> (..., out), same type."""
        if x.dtype != torch.bfloat16:
            return super().multiply(x)
        return self._kernel(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def _kernel(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group, self.levels)

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return f"{super().extra_repr()}, group={self.group}"
