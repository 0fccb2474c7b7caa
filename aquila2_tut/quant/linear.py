"""What the quantized linear maps share: a product whose weights are made from codes when needed, and kept by no one.

Autograd would keep the dequantized weights of every layer until the backward pass, and nothing would be saved. Here
the backward pass makes them anew. The input is not kept either: only the gradient of the weights would need it, and
they are frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..model.layers import product


class _FrozenProduct(torch.autograd.Function):
    """x W^T with a W that the layer makes when asked; for the backward pass, the layer is all that is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.multiply(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return product(gradient, ctx.layer.dequantized(gradient.dtype).t()), None


class QuantizedLinear(nn.Module):
    """A linear map with frozen, quantized weights.

    Args:
        linear: gives the sizes, the weights' type and the bias.
        tensors: name -> what is stored instead of the weights.
    """

    def __init__(self, linear: nn.Linear | QuantizedLinear, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # A layer made of a quantized one: the type of the weights that both stand for.
        self.dtype = linear.dtype if isinstance(linear, QuantizedLinear) else linear.weight.dtype
        self.bias = linear.bias
        self.train(linear.training)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as numbers."""
        raise NotImplementedError

    def multiply(self, x: Tensor) -> Tensor:
        """x W^T: (..., in) -> (..., out), same type."""
        return product(x, self.dequantized(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out), in the type of x or of autocast."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        out = _FrozenProduct.apply(x, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves what is stored to another device, but never to another type: `model.half()` must not round scales."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if self._buffers[name].dtype != tensor.dtype:
                self._buffers[name] = tensor.to(self._buffers[name].device)
        return self

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
