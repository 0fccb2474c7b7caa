"""LoRA: the weights stay as they are, and beside them a product of two thin matrices is trained.

A linear map W (out, in) becomes W + scale * B A, with A (r, in), B (out, r) and a small r. B begins with zeros, so that
the first step starts from the model as it was. W may be stored in four bits: that is Q-LoRA.

What a backward pass needs of the input x: the gradient of W would need x, but W is frozen; that of A needs x; that of B
needs x A^T, r numbers a token. So x is kept once, as it is, and the maps that share an input (queries, keys and values
do) share what is kept.

Source: Hu et al. 2021 (arXiv 2106.09685); Dettmers et al. 2023 (arXiv 2305.14314) for the frozen weights in four bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..model.layers import Linear, product
from ..quant.linear import QuantizedLinear
from .errors import TrainError


class _Updated(torch.autograd.Function):
    """out + scale * dropout(x) A^T B^T, which keeps x in its own type, and the r numbers that A^T leaves of a token.

    Autograd alone would keep x once more for every map: cast to the adapter's type, or as dropout leaves it.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
        dtype = _product_type(x, a)
        wide, kept = x.to(dtype), None
        if dropout:
            wide, kept = torch.native_dropout(wide, dropout, True)
        narrow = product(wide, a.to(dtype)) * scale
        ctx.save_for_backward(x, kept, narrow, a, b)  # of dropout, which numbers were kept: a byte each
        ctx.scale, ctx.dropout = scale, dropout
        return (out + product(narrow, b.to(dtype))).to(out.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, narrow, a, b = ctx.saved_tensors
        dtype = narrow.dtype

        def dropped(numbers: Tensor) -> Tensor:
            return numbers if kept is None else (numbers * kept).mul_(1 / (1 - ctx.dropout))

        wide = gradient.to(dtype)
        for_b = product(_rows(wide).t(), _rows(narrow).t()).to(b.dtype)
        for_narrow = product(wide, b.to(dtype).t()) * ctx.scale
        for_a = product(_rows(for_narrow).t(), _rows(dropped(x.to(dtype))).t()).to(a.dtype)
        for_x = dropped(product(for_narrow, a.to(dtype).t())).to(x.dtype) if ctx.needs_input_grad[1] else None
        return gradient, for_x, for_a, for_b, None, None


def _product_type(x: Tensor, a: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(x.dtype, a.dtype)


def _rows(x: Tensor) -> Tensor:
    """(..., n) -> (N, n)."""
    return x.reshape(-1, x.shape[-1])


class LoRALinear(nn.Module):
    """A frozen linear map with a trained update of rank r: base(x) + scale * B A dropout(x).

    A and B are float32, whatever the type of the base, and so are their products unless autocast says otherwise; the
    result has the type of the base's.

    Args:
        base: what is adapted: `nn.Linear`, a `Linear4bit` or `Linear8bit` of `aquila2_tut.quant`, or bitsandbytes' own.
            It is frozen.
        r: the rank.
        alpha: the update's weight; scale = alpha / r.
        dropout: the share of the adapter's input that is set to zero in training.
        rslora: scale = alpha / sqrt(r) instead, with which large ranks learn as fast as small ones (arXiv 2312.03732).

    Raises:
        TrainError: a base that is no linear map, a rank below 1, or a dropout that is no share.
    """

    def __init__(
        self, base: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, rslora: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear | QuantizedLinear):
            raise TrainError(f"LoRALinear goes around a linear map, not around {type(base).__name__}")
        if r < 1 or not 0 <= dropout < 1:
            raise TrainError(f"r must be at least 1 and dropout from 0 to below 1, not r={r} and dropout={dropout}")
        self.base_layer = base.requires_grad_(False)
        self.r, self.alpha, self.dropout, self.rslora = r, alpha, dropout, rslora
        self.scale = alpha / (math.sqrt(r) if rslora else r)
        like = {"device": next(itertools.chain(base.parameters(), base.buffers())).device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as torch begins a linear map
        self.merged: nn.Linear | None = None
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out), in the type of the base's result."""
        if self.merged is not None:
            return self.merged(x)
        dropout = self.dropout if self.training else 0.0
        return _Updated.apply(self.base_layer(x), x, self.lora_A, self.lora_B, self.scale, dropout)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """Makes one plain linear map of base and update, which `forward` uses until `unmerge`.

        A base in four bits is dequantized for it, and what comes out is not rounded to four bits again: the steps
        between its levels are larger than most updates, which would be lost.

        Returns:
            The map; its weights are summed in float32 at least and rounded once, to the base's type.
        """
        if self.merged is None:
            weight = base_weight(self.base_layer)
            update = self.scale * (self.lora_B @ self.lora_A)
            self.merged = _plain(self.base_layer, (weight + update).to(weight.dtype))
        return self.merged

    def unmerge(self) -> None:
        """Back to base and update. `merge` has left both alone, so they are what they were to the last bit."""
        self.merged = None

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}, rslora={self.rslora}"


def base_weight(base: nn.Module) -> Tensor:
    """The weight (out, in) of a linear map as numbers, in the type that it computes with.

    Raises:
        TrainError: weights that are neither plain, nor quantized by this package, nor bitsandbytes' 4 bits.
    """
    if isinstance(base, QuantizedLinear):
        return base.dequantized(base.dtype)
    if (state := getattr(base.weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(base.weight.data, state)
    if not base.weight.is_floating_point():
        raise TrainError(
            f"an update cannot be added to {base.weight.dtype} weights: load the base unquantized to merge"
        )
    return base.weight


def _plain(base: nn.Module, weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        size = base.in_features, base.out_features
        linear = Linear(*size) if base.bias is None else nn.Linear(*size)
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), base.bias
    return linear.train(base.training)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear maps of a model by name, with or without adapters."""
    kinds = nn.Linear | QuantizedLinear | LoRALinear
    inside = tuple(f"{name}." for name in lora_layers(model))
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and not n.startswith(inside)}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted linear maps of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_lora(
    model: nn.Module,
    targets: Iterable[str] = ("q_proj", "v_proj"),
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    rslora: bool = False,
) -> list[str]:
    """Freezes a model and puts an adapter beside the linear maps that are named; only the adapters are trained.

    Gradient checkpointing in torch's reentrant way needs an input with a gradient, and a frozen embedding gives none:
    call `model.enable_input_require_grads()` then. The other way, transformers' own choice, needs nothing.

    Args:
        model: changed in place.
        targets: the last parts of names, such as "q_proj", or whole names.
        r, alpha, dropout, rslora: see `LoRALinear`.

    Returns:
        The names of the maps that were adapted.

    Raises:
        TrainError: a target that the model does not have, or a model with adapters.
    """
    if lora_layers(model):
        raise TrainError("the model has adapters already: merge_all(model) folds them in")
    there, names = linears(model), []
    for target in dict.fromkeys(targets):
        found = [name for name in there if f".{name}".endswith(f".{target}")]
        if not found:
            kinds = sorted({name.rpartition(".")[2] for name in there})
            raise TrainError(f"no linear map is called {target!r}; the model has {', '.join(kinds) or 'none'}")
        names += found
    layers = {name: LoRALinear(there[name], r, alpha, dropout, rslora) for name in there if name in names}
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return list(layers)


def merge_all(model: nn.Module) -> list[str]:
    """Puts plain linear maps in the place of all adapted ones; the adapters are gone then.

    Returns:
        Their names.

    Raises:
        TrainError: an adapted map shares its weights with another part of the model, which must not change with it.
    """
    layers, owners = lora_layers(model), list(model.named_parameters(remove_duplicate=False))
    for name, layer in layers.items():
        for other, weight in owners:
            if weight is getattr(layer.base_layer, "weight", None) and not other.startswith(f"{name}."):
                raise TrainError(f"{name} shares its weights with {other}: give it its own before merging")
    for name, layer in layers.items():
        model.set_submodule(name, layer.merge())
    return list(layers)
