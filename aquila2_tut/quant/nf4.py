"""NF4: four bits a weight, at levels that normally distributed weights use equally often.

A block of 64 weights is divided by its largest magnitude, each is replaced by the nearest of 16 levels in [-1, 1], and
two codes share a byte. Double quantization stores the blocks' scales in 8 bits as well. Codes and scales are those of
bitsandbytes, bit for bit, and lie in the same order; of the doubly quantized scales, one in several hundred is the
neighbouring one of the 256 levels.

Source: Dettmers et al. 2023 (arXiv 2305.14314), section 3; for the 8-bit levels of the scales, Dettmers et al. 2022
(arXiv 2110.02861), section 1.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.costs import has_values
from .errors import QuantError, refuse_non_finite
from .linear import QuantizedLinear

SCALES_BLOCK = 256  # scales that share a scale of their own, with double quantization
_AT_ONCE = 1 << 22  # weights on their way from one type to the other: what is in between takes megabytes, not gigabytes
_TINY = 1e-38  # below it a reciprocal overflows; such a block becomes zeros


def _nf4_code() -> Tensor:
    """The 16 levels: quantiles of the normal distribution, seven below zero, zero, and eight above, over the largest.

    The paper takes the outermost at the mean of 1 - 1/30 and 1 - 1/32. Released models were made with seven digits of
    it and float32 steps, so the same numbers are used here.
    """

    def positive(many: int) -> Tensor:
        probabilities = torch.linspace(0.9677083, 0.5, many + 1, device="cpu")[:-1]
        return torch.special.ndtri(probabilities.double()).float()

    levels = torch.cat([-positive(7), torch.zeros(1, device="cpu"), positive(8).flip(0)])
    return levels / levels.max()


def _dynamic_code() -> Tensor:
    """The 256 levels of a scale: seven decades, the higher the finer; zero; and one, which has no negative.

    Decade e, from 10^(e-7) to 10^(e-6), is cut into 2^e equal parts, and their middles are the levels.
    """
    edges = [torch.linspace(0.1, 1, 2**e + 1, device="cpu") for e in range(7)]
    positive = torch.cat([10.0 ** (e - 6) * ((x[:-1] + x[1:]) / 2) for e, x in enumerate(edges)])
    return torch.cat([-positive, torch.tensor([0.0, 1.0], device="cpu"), positive]).sort().values


def _middles(code: Tensor) -> list[float]:
    return ((code[:-1] + code[1:]) / 2).tolist()


NF4_CODE = _nf4_code()
# As lists, not tensors: in a rehearsal with fake tensors a real one must not meet them.
_NF4_MIDDLES, _ZERO = _middles(NF4_CODE), NF4_CODE.tolist().index(0)
_PAIRS = [[high, low] for high in NF4_CODE.tolist() for low in NF4_CODE.tolist()]
DYNAMIC_CODE = _dynamic_code()
_DYNAMIC, _DYNAMIC_MIDDLES = DYNAMIC_CODE.tolist(), _middles(DYNAMIC_CODE)


@dataclass(frozen=True)
class DoubleQuantized:
    """Scales of blocks, in 8 bits each.

    Args:
        codes: (blocks,) uint8.
        absmax: float32, the largest magnitude of each 256 scales, after `mean` was taken off.
        mean: () float32. Scales are positive, the levels lie on both sides of zero: without it half would be wasted.
    """

    codes: Tensor
    absmax: Tensor
    mean: Tensor

    def values(self) -> Tensor:
        """The scales, (blocks,) in float32."""
        levels = torch.tensor(_DYNAMIC, device=self.codes.device).index_select(0, self.codes.int())
        return levels * self.absmax.repeat_interleave(SCALES_BLOCK)[: len(levels)] + self.mean


@dataclass(frozen=True)
class NF4Tensor:
    """A tensor in NF4.

    Args:
        codes: (ceil(n / 2),) uint8; the earlier of two weights has the higher four bits.
        scales: (blocks,) float32, the largest magnitude of each block; or the same in 8 bits.
        blocksize: weights in a block, consecutive ones of the flattened tensor.
        shape: of the tensor.
        dtype: of the tensor.
    """

    codes: Tensor
    scales: Tensor | DoubleQuantized
    blocksize: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is stored."""
        if isinstance(self.scales, Tensor):
            return {"codes": self.codes, "scales": self.scales}
        double = {"scales": self.scales.codes, "scales_absmax": self.scales.absmax, "scales_mean": self.scales.mean}
        return {"codes": self.codes} | double

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def storage_bytes(shape: tuple[int, ...], blocksize: int = 64, double_quant: bool = False) -> int:
    """Bytes that a tensor takes in NF4: a half a weight, and the scales.

    Args:
        shape: of the tensor.
        blocksize: weights that share a scale.
        double_quant: whether a scale takes 1 byte (and 4 for each 256 of them, and 4 for the mean) instead of 4.
    """
    weights = torch.Size(shape).numel()
    scales = -(-weights // blocksize)
    return -(-weights // 2) + (scales + 4 * -(-scales // SCALES_BLOCK) + 4 if double_quant else 4 * scales)


def _spans(weights: int, blocksize: int) -> Iterator[slice]:
    """Whole blocks, some millions of weights at a time; what is left, less than a block, comes last."""
    whole = weights - weights % blocksize
    step = max(1, _AT_ONCE // blocksize) * blocksize
    for start, stop in pairwise(sorted({*range(0, whole, step), 0, whole, weights})):
        yield slice(start, stop)


def quantize_nf4(x: Tensor, blocksize: int = 64, double_quant: bool = False) -> NF4Tensor:
    """Puts a tensor into four bits a number.

    Args:
        x: floating-point numbers of any shape; their gradient ends here.
        blocksize: numbers that share a scale; even, as two codes share a byte.
        double_quant: store the scales in 8 bits.

    Raises:
        QuantError: a number that is not finite, no floating-point numbers at all, or an odd block size.
    """
    if not x.is_floating_point():
        raise QuantError(f"NF4 is for floating-point numbers, not {x.dtype}")
    if blocksize < 2 or blocksize % 2:
        raise QuantError(f"the block size must be even and positive, not {blocksize}")
    flat = x.detach().reshape(-1)
    codes = flat.new_empty(-(-len(flat) // 2), dtype=torch.uint8)
    scales = flat.new_empty(-(-len(flat) // blocksize), dtype=torch.float32)
    for span in _spans(len(flat), blocksize):
        blocks = flat[span].float().view(-1, min(blocksize, span.stop - span.start))
        absmax = blocks.abs().amax(1)
        scales[span.start // blocksize : -(-span.stop // blocksize)] = absmax
        codes[span.start // 2 : -(-span.stop // 2)] = _packed(blocks * _reciprocal(absmax))
    refuse_non_finite(x, scales)
    return NF4Tensor(codes, _double_quantized(scales) if double_quant else scales, blocksize, x.shape, x.dtype)


def _reciprocal(absmax: Tensor) -> Tensor:
    """(blocks,) -> (blocks, 1). Multiplied with instead of divided by, as bitsandbytes does: ties fall the same way."""
    return (1 / absmax.clamp(min=_TINY))[:, None]


def _packed(x: Tensor) -> Tensor:
    """The bytes of numbers in [-1, 1], any shape -> (ceil(n / 2),)."""
    codes = torch.zeros(2 * -(-x.numel() // 2), dtype=torch.uint8, device=x.device)
    codes[x.numel() :] = _ZERO
    below = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    for middle in _NF4_MIDDLES:
        codes[: x.numel()] += torch.gt(x, middle, out=below).view(-1)
    return codes[::2] << 4 | codes[1::2]


def _double_quantized(scales: Tensor) -> DoubleQuantized:
    """Scales (blocks,) in float32 -> in 8 bits."""
    mean = scales.mean() if len(scales) else scales.new_zeros(())
    if has_values(mean) and not mean.isfinite():
        raise QuantError("the numbers are too large for double quantization: the mean of their scales overflows")
    centred = F.pad(scales - mean, (0, -len(scales) % SCALES_BLOCK)).view(-1, SCALES_BLOCK)
    absmax = centred.abs().amax(1)
    middles = torch.tensor(_DYNAMIC_MIDDLES, device=scales.device)
    codes = torch.bucketize(centred * _reciprocal(absmax), middles, out_int32=True).to(torch.uint8)
    return DoubleQuantized(codes.view(-1)[: len(scales)].clone(), absmax, mean)


def dequantize_nf4(q: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor that the codes stand for.

    Args:
        q: what `quantize_nf4` made.
        dtype: of the result; that of the quantized tensor when not given. Products are in float32 in any case.

    Returns:
        A tensor of the shape that was quantized.
    """
    scales = q.scales if isinstance(q.scales, Tensor) else q.scales.values()
    # Both weights of a byte at once: two float32 levels move as one number of eight bytes, twice as fast.
    pairs = torch.tensor(_PAIRS, device=q.codes.device).view(torch.float64).view(-1)
    out = torch.empty(q.shape.numel(), dtype=dtype or q.dtype, device=q.codes.device)
    for span in _spans(len(out), q.blocksize):
        weights = span.stop - span.start
        codes = q.codes[span.start // 2 : -(-span.stop // 2)]
        levels = pairs.index_select(0, codes.int()).view(torch.float32)[:weights]
        factors = scales[span.start // q.blocksize : -(-span.stop // q.blocksize), None]
        out[span] = levels.view(-1, min(q.blocksize, weights)).mul_(factors).view(-1)
    return out.view(q.shape)


class Linear4bit(QuantizedLinear):
    """A linear map whose frozen weights are in NF4, and become numbers only while a product needs them.

    A linear map on the meta device gives an empty one, to be filled with `load_state_dict(..., assign=True)`.

    Args:
        linear: gives the weights, which are rounded, and the bias, which stays as it is.
        blocksize: weights that share a scale.
        double_quant: store the scales in 8 bits.
    """

    def __init__(self, linear: nn.Linear, blocksize: int = 64, double_quant: bool = False) -> None:
        q = quantize_nf4(linear.weight, blocksize, double_quant)
        super().__init__(linear, q.tensors)
        self.blocksize, self.double_quant = blocksize, double_quant

    @property
    def quantized(self) -> NF4Tensor:
        """The weight (out, in), as it is stored."""
        scales = (
            DoubleQuantized(self.scales, self.scales_absmax, self.scales_mean) if self.double_quant else self.scales
        )
        return NF4Tensor(
            self.codes, scales, self.blocksize, torch.Size((self.out_features, self.in_features)), self.dtype
        )

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as numbers."""
        return dequantize_nf4(self.quantized, dtype)

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return f"{super().extra_repr()}, blocksize={self.blocksize}, double_quant={self.double_quant}"
