"""Which library multiplies: oneDNN takes float32 products on a CPU, torch's own does all the others."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@functools.cache
def onednn_linear_works() -> bool:
    """Whether torch can hand a float32 product to oneDNN, and gets it right."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, w = torch.ones(1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    try:
        return torch.equal(torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""), x @ w.T)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False


_ONEDNN_WANTED = ContextVar("onednn_wanted", default=True)


@contextlib.contextmanager
def torch_products() -> Iterator[None]:
    """Within the block every product is torch's own, and sums in the order in which transformers' products do."""
    before = _ONEDNN_WANTED.set(False)
    try:
        yield
    finally:
        _ONEDNN_WANTED.reset(before)


def for_onednn(x: Tensor) -> bool:
    """Whether a product with this tensor may go to oneDNN: it is a plain one on a CPU, and oneDNN is there."""
    # A tensor subclass (a fake tensor, a functional one) has its own idea of what an operator does.
    plain = x.is_cpu and type(x) in (Tensor, nn.Parameter) and not torch.is_autocast_enabled("cpu")
    return plain and _ONEDNN_WANTED.get() and torch.backends.mkldnn.enabled and onednn_linear_works()


def float32_by_onednn(x: Tensor, w: Tensor) -> bool:
    """Whether oneDNN takes the product of these two."""
    # oneDNN knows no empty product.
    return x.dtype == w.dtype == torch.float32 and x.numel() > 0 and for_onednn(x)


def product(x: Tensor, w: Tensor) -> Tensor:
    """x W^T where no gradient is wanted: by oneDNN if both are float32 on a CPU, which is twice as fast.

    Args:
        x: (..., in).
        w: (out, in); a transposed view will do, one with gaps between its rows is hundreds of times slower.

    Returns:
        (..., out).
    """
    if float32_by_onednn(x, w):
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return F.linear(x, w)
