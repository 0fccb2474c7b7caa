"""Weights on an even grid, chosen by what the layer's inputs look like: GPTQ and AWQ beside rounding to nearest.

What matters of a linear map is its output. With inputs X (tokens as rows), replacing W by Q changes it by
||X (W - Q)^T||^2 = tr((W - Q) H (W - Q)^T). H = X^T X says how much an error in a column costs, and which errors in
other columns make up for it. GPTQ rounds column after column and lets the later ones make up for each error; AWQ rounds
all at once, on a grid stretched where the inputs are large.

Each token has one voice here: its inputs are divided by their root mean square before they enter H. The papers do not;
but at some layers of a language model the first token is thousands of times as large as the others, and H would then
describe that token and no other.

Source: Frantar et al. 2022 (arXiv 2210.17323); Lin et al. 2023 (arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import QuantError, refuse_non_finite
from .grid import Grid, GridTensor, round_to_nearest

_SILENT = 1e-12  # a token of zeros has nothing to say
_TRIED = 20  # exponents of AWQ between 0 and 1, as in its paper


@dataclass(frozen=True)
class Calibration:
    """What a layer's inputs look like.

    Args:
        hessian: (in, in) float32, X^T X over the number of tokens, each token's inputs over their root mean square.
        magnitude: (in,) float32, the mean of |x|.
    """

    hessian: Tensor
    magnitude: Tensor


class Collector:
    """Looks at inputs, a batch at a time, and keeps only their sums."""

    def __init__(self) -> None:
        self.tokens, self.hessian, self.magnitude = 0, torch.zeros(()), torch.zeros(())

    def add(self, batch: Tensor) -> None:
        """Looks at inputs (..., in).

        Raises:
            QuantError: a number that is not finite.
        """
        x = batch.detach().reshape(-1, batch.shape[-1]).float()
        refuse_non_finite(batch, x.abs().amax(0) if len(x) else x)
        self.tokens += len(x)
        self.magnitude = self.magnitude.to(x.device) + x.abs().sum(0)
        x = x / x.square().mean(1, keepdim=True).sqrt().clamp(min=_SILENT)
        self.hessian = self.hessian.to(x.device) + x.t() @ x

    def calibration(self) -> Calibration:
        """What was seen.

        Raises:
            QuantError: nothing was.
        """
        if not self.tokens:
            raise QuantError("no inputs to calibrate with: pass at least one batch with tokens")
        return Calibration(self.hessian / self.tokens, self.magnitude / self.tokens)


def calibrate(batches: Iterable[Tensor]) -> Calibration:
    """What the inputs of a layer look like.

    Args:
        batches: (..., in) each.

    Raises:
        QuantError: no tokens at all, or a number that is not finite.
    """
    collector = Collector()
    for batch in batches:
        collector.add(batch)
    return collector.calibration()


def gptq(weight: Tensor, hessian: Tensor, bits: int = 4, group: int = 128, damping: float = 0.01) -> GridTensor:
    """Rounds column after column; the columns still to come are moved so that they make up for each error.

    The best move for an error e in column j is -e H^-1[j, later] / H^-1[j, j], where H^-1 is the inverse over the
    columns from j on. All these inverses are in one matrix: row j of the upper Cholesky factor of H^-1, scaled.

    Args:
        weight: (out, in).
        hessian: (in, in), from `calibrate`.
        bits: of a code.
        group: columns that share a grid, in each row. It is laid when the first of them is reached.
        damping: times the mean of the diagonal, added to it: few inputs do not tell all columns apart.

    Raises:
        QuantError: a number that is not finite, shapes that do not fit, or a hessian that is no X^T X.
    """
    refuse_non_finite(weight, weight.detach().float().abs().amax(0))
    factor = _inverse_factor(hessian, weight.shape[1], damping)
    rest = weight.detach().float().clone()
    codes, grids = [], []
    for start in range(0, weight.shape[1], group):
        columns = slice(start, start + group)
        grids.append(Grid.around(rest[:, columns], bits))
        rounded, errors = _round_columns(rest[:, columns], factor[columns, columns], grids[-1])
        codes.append(rounded)
        # The columns of later groups hear of this group's errors all at once: one product instead of many.
        rest[:, start + group :] -= errors @ factor[columns, start + group :]
    return GridTensor.of_groups(codes, grids, group)


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


def _round_columns(rest: Tensor, factor: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Rounds the columns of a group, one after the other, each error moving those that follow.

    Args:
        rest: (out, group), what is to be rounded; changed.
        factor: (group, group), the group's part of U.
        grid: the levels.

    Returns:
        The codes, and the errors over their U[j, j]: (out, group) each, in float32.
    """
    codes, errors = torch.empty_like(rest), torch.empty_like(rest)
    for j in range(rest.shape[1]):
        column = rest[:, j : j + 1]
        codes[:, j : j + 1] = grid.codes(column)
        errors[:, j : j + 1] = (column - grid.values(codes[:, j : j + 1])) / factor[j, j]
        rest[:, j + 1 :] -= errors[:, j : j + 1] * factor[j, j + 1 :]
    return codes, errors


def awq(weight: Tensor, calibration: Calibration, bits: int = 4, group: int = 128) -> Tensor:
    """Rounds to nearest after stretching the columns with large inputs, whose errors cost most, and shrinks them back.

    The inputs are divided by the same stretch when the layer runs; here the rounded weight has it divided out, which
    gives the same product.

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
    stretch = awq_stretch([weight], calibration, bits, group)
    return round_to_nearest(weight * stretch, bits, group).values() / stretch


def awq_stretch(weights: Sequence[Tensor], calibration: Calibration, bits: int = 4, group: int = 128) -> Tensor:
    """The stretch of columns that AWQ looks for, one for all linear maps that have the same inputs.

    It is the inputs' mean magnitude to a power between 0 (none: rounding to nearest) and 1; the power that changes the
    outputs least is taken. Scaled so that the smallest and the largest are as far from 1.

    Args:
        weights: (out, in) each.
        calibration: of their inputs.
        bits: of a code.
        group: columns that share a grid, in each row.

    Returns:
        (in,) float32.
    """
    best, least = torch.ones_like(calibration.magnitude), torch.inf
    for power in torch.linspace(0, 1, _TRIED + 1)[:-1].tolist():
        stretch = calibration.magnitude.clamp(min=1e-4) ** power
        stretch = stretch / (stretch.max() * stretch.min()).sqrt()
        rounded = [round_to_nearest(weight * stretch, bits, group).values() / stretch for weight in weights]
        pairs = zip(weights, rounded, strict=True)
        if (error := sum(_change(w, r, calibration.hessian) for w, r in pairs)) < least:
            best, least = stretch, error
    return best


def _change(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """||X (W - Q)^T||^2 a token."""
    change = weight.detach().float() - rounded
    return float(((change @ hessian) * change).sum())


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """How much of a layer's output the rounding changes: ||X (W - Q)^T||^2 over ||X W^T||^2, each token counting alike.

    Args:
        weight, rounded: (out, in).
        hessian: (in, in), from `calibrate`.
    """
    weight, hessian = weight.detach().double(), hessian.double()
    change = weight - rounded.detach().double()
    return float(((change @ hessian) * change).sum() / ((weight @ hessian) * weight).sum())
