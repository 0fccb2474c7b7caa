"""What goes wrong in quantizing."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.costs import has_values


class QuantError(ValueError):
    """Something that cannot be put into few bits, or codes that do not fit together."""


def refuse_non_finite(x: Tensor, absmax: Tensor) -> None:
    """One nan would turn its whole block into nan, and an infinity the rest of it into zeros.

    Args:
        x: what was given, of any shape.
        absmax: the largest magnitudes of its blocks in float32. There is far less of them to look through.

    Raises:
        QuantError: names the first value that is not finite in float32, and its place.
    """
    if not has_values(absmax) or bool(absmax.isfinite().all()):
        return
    wrong = (~x.detach().to(torch.float32).isfinite()).nonzero()
    if not len(wrong):
        return
    at = wrong[0].tolist()
    value = x[tuple(at)].item()
    raise QuantError(f"{value} at {at} of a tensor of shape {list(x.shape)}: only finite float32 numbers have a code")
