"""Weights on an even grid, chosen by what the layer's inputs look like: GPTQ and AWQ beside rounding to nearest.

What matters of a linear map is its output. With inputs X (tokens as rows), replacing W by Q changes it by
||X (W - Q)^T||^2 = tr((W - Q) H (W - Q)^T). H = X^T X says how much an error in a column costs, and which errors in
other columns make up for it. GPTQ rounds column after column and lets the later ones make up for each error; AWQ rounds
all at once, on a grid stretched where the inputs are large.

Source: Frantar et al. 2022 (arXiv 2210.17323); Lin et al. 2023 (arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import QuantError, refuse_non_finite

_TRIED = 20  # exponents of AWQ between 0 and 1, as in its paper


@dataclass(frozen=True)
class Calibration:
    """What a layer's inputs look like.

    Args:
        hessian: (in, in) float32, X^T X over the number of tokens.
        magnitude: (in,) float32, the mean of |x|.
    """

    hessian: Tensor
    magnitude: Tensor


def calibrate(batches: Iterable[Tensor]) -> Calibration:
    """Looks at the inputs of a layer, a batch at a time.

    Args:
        batches: (..., in) each.

    Raises:
        QuantError: no tokens at all, or a number that is not finite.
    """
    tokens, hessian, magnitude = 0, 0, 0
    for batch in batches:
        x = batch.detach().reshape(-1, batch.shape[-1]).float()
        refuse_non_finite(batch, x.abs().amax(0) if len(x) else x)
        tokens, hessian, magnitude = tokens + len(x), hessian + x.t() @ x, magnitude + x.abs().sum(0)
    if not tokens:
        raise QuantError("no inputs to calibrate with: pass at least one batch with tokens")
    return Calibration(hessian / tokens, magnitude / tokens)


@dataclass(frozen=True)
class Grid:
    """Evenly spaced levels, other ones for each row: step * (code - zero), codes from 0 to 2^bits - 1.

    Args:
        step: (..., 1) float32.
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
        step = (high - low).clamp(min=1e-30) / (2**bits - 1)
        return cls(step, (-low / step).round(), bits)

    def round(self, weight: Tensor) -> Tensor:
        """The nearest levels. weight: (..., columns)."""
        codes = (weight / self.step + self.zero).round().clamp(0, 2**self.bits - 1)
        return self.step * (codes - self.zero)


def round_to_nearest(weight: Tensor, bits: int = 4, group: int = 128) -> Tensor:
    """Each weight at the nearest level of its group.

    Args:
        weight: (out, in).
        bits: of a code.
        group: columns that share a grid, in each row; the last group may be smaller.

    Returns:
        The rounded weight, (out, in) in float32.

    Raises:
        QuantError: a number that is not finite, or a number of bits that there is no grid for.
    """
    refuse_non_finite(weight, weight.detach().float().abs().amax(0))
    return torch.cat([Grid.around(part, bits).round(part.float()) for part in weight.detach().split(group, 1)], 1)


def gptq(weight: Tensor, hessian: Tensor, bits: int = 4, group: int = 128, damping: float = 0.01) -> Tensor:
    """Rounds column after column; the columns still to come are moved so that they make up for each error.

    The best move for an error e in column j is -e H^-1[j, later] / H^-1[j, j], where H^-1 is the inverse over the
    columns from j on. All these inverses are in one matrix: row j of the upper Cholesky factor of H^-1, scaled.

    Args:
        weight: (out, in).
        hessian: (in, in), from `calibrate`.
        bits: of a code.
        group: columns that share a grid, in each row. It is laid when the first of them is reached.
        damping: times the mean of the diagonal, added to it: few inputs do not tell all columns apart.

    Returns:
        The rounded weight, (out, in) in float32.

    Raises:
        QuantError: a number that is not finite, shapes that do not fit, or a hessian that is no X^T X.
    """
    refuse_non_finite(weight, weight.detach().float().abs().amax(0))
    factor = _inverse_factor(hessian, weight.shape[1], damping)
    rest, rounded = weight.detach().float().clone(), torch.empty(weight.shape, device=weight.device)
    for start in range(0, weight.shape[1], group):
        columns = slice(start, start + group)
        grid = Grid.around(rest[:, columns], bits)
        errors = _round_columns(rest[:, columns], rounded[:, columns], factor[columns, columns], grid)
        # The columns of later groups hear of this group's errors all at once: one product instead of many.
        rest[:, start + group :] -= errors @ factor[columns, start + group :]
    return rounded


def _inverse_factor(hessian: Tensor, inputs: int, damping: float) -> Tensor:
    """U with U^T U = H^-1, upper triangular, (in, in) in float32; computed in float64."""
    if hessian.shape != (inputs, inputs):
        raise QuantError(f"a weight with {inputs} columns needs a hessian of that size, not {tuple(hessian.shape)}")
    h = hessian.double()
    unused = h.diagonal() == 0  # an input that is always zero: its weights cost nothing, whatever they are
    h = h + torch.diag(damping * h.diagonal().mean() + unused)
    lower, fault = torch.linalg.cholesky_ex(h)
    if fault:
        raise QuantError("the hessian is not positive definite: make it with `calibrate`, or raise the damping")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


def _round_columns(rest: Tensor, rounded: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """Rounds the columns of a group, one after the other, each error moving those that follow.

    Args:
        rest: (out, group), what is to be rounded; changed.
        rounded: (out, group), filled.
        factor: (group, group), the group's part of U.
        grid: the levels.

    Returns:
        The errors, (out, group), each over its U[j, j].
    """
    errors = torch.empty_like(rest)
    for j in range(rest.shape[1]):
        rounded[:, j : j + 1] = grid.round(rest[:, j : j + 1])
        errors[:, j] = (rest[:, j] - rounded[:, j]) / factor[j, j]
        rest[:, j + 1 :] -= errors[:, j : j + 1] * factor[j, j + 1 :]
    return errors


def awq(weight: Tensor, calibration: Calibration, bits: int = 4, group: int = 128) -> Tensor:
    """Rounds to nearest after stretching the columns with large inputs, whose errors cost most, and shrinks them back.

    The stretch is the inputs' mean magnitude to a power between 0 (none: rounding to nearest) and 1; the power that
    changes the output least is taken. The inputs are divided by the same stretch when the layer runs; here the rounded
    weight has it divided out, which gives the same product.

    Args:
        weight: (out, in).
        calibration: of the layer's inputs.
        bits: of a code.
        group: columns that share a grid, in each row.

    Returns:
        The rounded weight, (out, in) in float32.

    Raises:
        QuantError: a number that is not finite, or a number of bits that there is no grid for.
    """
    best, least = weight, torch.inf
    for power in torch.linspace(0, 1, _TRIED + 1)[:-1].tolist():
        stretch = calibration.magnitude.clamp(min=1e-4) ** power
        rounded = round_to_nearest(weight * stretch, bits, group) / stretch
        if (error := output_error(weight, rounded, calibration.hessian)) < least:
            best, least = rounded, error
    return best


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """How much of a layer's output the rounding changes: ||X (W - Q)^T||^2 over ||X W^T||^2.

    Args:
        weight, rounded: (out, in).
        hessian: (in, in), from `calibrate`.
    """
    change, weight, hessian = (weight.double() - rounded.double()), weight.double(), hessian.double()
    return float(((change @ hessian) * change).sum() / ((weight @ hessian) * weight).sum())
