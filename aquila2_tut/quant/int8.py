"""Eight bits a number: whole numbers from -127 to 127 and a scale; and LLM.int8(), which leaves outliers as they are.

Source: Dettmers et al. 2022 (arXiv 2208.07339), section 2 for the scales, section 3 for the decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.layers import product
from .errors import QuantError, refuse_non_finite
from .linear import QuantizedLinear

LARGEST = 127  # -128 is left out, so that zero is in the middle
_TINY = 1e-36  # below it 127 / absmax overflows; such numbers become zeros
Grouping = Literal["tensor", "row"] | int


@dataclass(frozen=True)
class Int8Tensor:
    """A tensor in int8.

    Args:
        codes: int8, in the shape of the tensor.
        absmax: (groups,) float32, the largest magnitude of each group of numbers; its code is 127.
        per: what shares a scale; see `quantize_int8`.
        dtype: of the tensor.
    """

    codes: Tensor
    absmax: Tensor
    per: Grouping
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return self.codes.nbytes + self.absmax.nbytes


def _groups(x: Tensor, per: Grouping) -> Tensor:
    """The numbers that share a scale, (groups, n); the last block is filled up with zeros."""
    if not x.numel():
        return x.new_empty(0, 1)
    if per == "tensor" or not x.ndim:
        return x.reshape(1, -1)
    if per == "row":
        return x.reshape(-1, x.shape[-1])
    if isinstance(per, str) or per < 1:
        raise QuantError(f'a scale is for a "tensor", a "row" or a positive number of numbers, not {per!r}')
    flat = x.reshape(-1)
    return F.pad(flat, (0, -len(flat) % per)).view(-1, per)


def quantize_int8(x: Tensor, per: Grouping = "row") -> Int8Tensor:
    """Divides by the largest magnitude, so that it becomes 127, and rounds.

    Args:
        x: floating-point numbers of any shape; their gradient ends here.
        per: what shares a scale: the "tensor", each "row" (the last dimension), or so many consecutive numbers.

    Raises:
        QuantError: a number that is not finite, no floating-point numbers at all, or an unknown `per`.
    """
    if not x.is_floating_point():
        raise QuantError(f"int8 codes are for floating-point numbers, not {x.dtype}")
    groups = _groups(x.detach(), per).float()
    absmax = groups.abs().amax(1)
    refuse_non_finite(x, absmax)
    codes = (groups * (LARGEST / absmax.clamp(min=_TINY))[:, None]).round_().to(torch.int8)
    return Int8Tensor(codes.reshape(-1)[: x.numel()].view(x.shape), absmax, per, x.dtype)


def dequantize_int8(q: Int8Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor that the codes stand for.

    Args:
        q: what `quantize_int8` made.
        dtype: of the result; that of the quantized tensor when not given.
    """
    numbers = _groups(q.codes, q.per) * (q.absmax / LARGEST)[:, None]
    return numbers.view(-1)[: q.codes.numel()].view(q.codes.shape).to(dtype or q.dtype)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of int8 numbers, exactly.

    Args:
        a: (N, K) int8.
        b: (M, K) int8.

    Returns:
        (N, M) int32.
    """
    rows, columns = len(a), len(b)
    if a.is_cuda:  # its tensor cores take more than 16 rows, and multiples of 8
        a = F.pad(a, (0, -a.shape[1] % 8, 0, max(0, 17 - rows)))
        b = F.pad(b, (0, -b.shape[1] % 8, 0, -columns % 8))
    return torch._int_mm(a, b.t())[:rows, :columns]


def mixed_product(x: Tensor, weight: Int8Tensor, threshold: float = 6.0) -> Tensor:
    """x W^T in int8, save for the columns of x with outliers: those are multiplied in the type of x.

    A few hidden dimensions carry magnitudes far above all others. A row that shares a scale with one of them would have
    few codes left for the rest.

    Args:
        x: (..., in).
        weight: (out, in), a scale per row.
        threshold: a column of x in which any magnitude reaches it is an outlier; `inf` for none.

    Returns:
        (..., out), in the type of x.

    Raises:
        QuantError: a number that is not finite.
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    outlier = (rows.abs() >= threshold).any(0)
    q = quantize_int8(rows.masked_fill(outlier, 0))
    scales = q.absmax[:, None] * (weight.absmax / LARGEST**2)
    out = (integer_product(q.codes, weight.codes) * scales).to(x.dtype)
    columns = outlier.nonzero().view(-1)
    if len(columns):
        part = Int8Tensor(weight.codes[:, columns], weight.absmax, "row", x.dtype)
        out += product(rows[:, columns], dequantize_int8(part))
    return out.view(*x.shape[:-1], -1)


class Linear8bit(QuantizedLinear):
    """A linear map with frozen weights in int8, multiplied as LLM.int8() does.

    Gradients pass as if the input had not been rounded.

    Args:
        linear: gives the weights, which are rounded, and the bias, which stays as it is.
        threshold: of an outlier; see `mixed_product`.
    """

    def __init__(self, linear: nn.Linear, threshold: float = 6.0) -> None:
        q = quantize_int8(linear.weight)
        super().__init__(linear, {"codes": q.codes, "absmax": q.absmax})
        self.threshold = threshold

    @property
    def quantized(self) -> Int8Tensor:
        """The weight (out, in), as it is stored."""
        return Int8Tensor(self.codes, self.absmax, "row", self.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as numbers."""
        return dequantize_int8(self.quantized, dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """x W^T: (..., in) -> (..., out), same type."""
        return mixed_product(x, self.quantized, self.threshold)

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return f"{super().extra_repr()}, threshold={self.threshold}"
