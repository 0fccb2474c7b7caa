"""The parts of a decoder layer: RMSNorm, the linear map, SwiGLU, attention with a cache, and the layer itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config import Aquila2Config
from .attention import Mask, attention, attention_weights
from .documents import Documents
from .products import float32_by_onednn, for_onednn, product
from .products import torch_products as torch_products  # where readers of the book look for it
from .rope import rotate


class RMSNorm(nn.Module):
    """Divides each vector by its root mean square, then scales each dimension: w * x / sqrt(mean(x^2) + eps).

    In half precision Aquila2 multiplies with the weight in float32 and then casts; LLaMA casts first. That is the one
    place where the two differ.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C) -> (..., C), same dtype."""
        if x.dtype == self.weight.dtype:  # torch computes in float32 inside and casts once, at the end
            # Autocast on CUDA would have it cast x to float32 before, keep that, and return float32 to what follows.
            off = contextlib.nullcontext()
            if torch.is_autocast_enabled(x.device.type):
                off = torch.autocast(x.device.type, enabled=False)
            with off:
                return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class _OneDNNLinear(torch.autograd.Function):
    """The linear map with all three of its products in oneDNN. What is frozen costs neither time nor memory."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)
        return product(x, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        for_x = None if w is None else product(gradient, w.t())
        for_w = None if x is None else product(gradient.flatten(0, -2).t(), x.flatten(0, -2).t())
        return for_x, for_w


class Linear(nn.Linear):
    """x W^T, without a bias.

    A float32 product on a CPU goes to oneDNN, which torch itself calls only for half precision:
    `benchmarks/inference.py` and `benchmarks/pretrain.py` show what that gains. Everything else is torch's own linear
    map, and so is this inside `torch_products`.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        w = self.weight
        packed = self.__dict__.get("packed")
        if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
            return _OneDNNLinear.apply(x, w) if float32_by_onednn(x, w) else F.linear(x, w)
        if packed is None or x.numel() != x.shape[-1] or x.dtype != w.dtype or not for_onednn(x):
            return product(x, w)
        return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def linear(config: Aquila2Config, inputs: int, outputs: int) -> nn.Linear:
    """A linear map for a model of this configuration.

    transformers and torchao replace torch's own class and no class made from it; with a quantization in the
    configuration they must find that one, or the model would stay as large as it was.
    """
    quantized = getattr(config, "quantization_config", None) is not None
    return nn.Linear(inputs, outputs, bias=False) if quantized else Linear(inputs, outputs)


_PACKED_FROM, _PACKED_UP_TO = 1 << 19, 1 << 30  # weights of a matrix; bytes of all copies


@contextlib.contextmanager
def packed_for_decoding(model: nn.Module) -> Iterator[None]:
    """Keeps copies of the large bfloat16 matrices in oneDNN's own order for as long as one answer takes.

    For a product with a single token oneDNN otherwise reorders each matrix anew, which costs more than the product.
    The copies end with the block, so that no later change of a weight is missed. Does nothing off the CPU, for other
    types, and for models whose copies would take more than 1 GiB.
    """
    linears = [m for m in model.modules() if isinstance(m, Linear) and m.weight.numel() >= _PACKED_FROM]
    linears = [m for m in linears if m.weight.dtype == torch.bfloat16 and for_onednn(m.weight)]
    if sum(m.weight.nbytes for m in linears) > _PACKED_UP_TO:
        linears = []
    for linear in linears:
        # Past nn.Module, which would take the copy for one of the module's parameters.
        linear.__dict__["packed"] = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
    try:
        yield
    finally:
        for linear in linears:
            linear.__dict__.pop("packed", None)


class _GatedProduct(torch.autograd.Function):
    """silu(gate) * up, which keeps its two inputs and nothing in between: a third less than autograd would."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


class SwiGLU(nn.Module):
    """The feed-forward block: down(silu(gate(x)) * up(x)).

    Source: Shazeer 2020 (arXiv 2002.05202).
    """

    def __init__(self, config: Aquila2Config) -> None:
        super().__init__()
        self.gate_proj = linear(config, config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config, config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config, config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) -> (B, T, C); in between (B, T, F)."""
        return self.down_proj(_GatedProduct.apply(self.gate_proj(x), self.up_proj(x)))


class Attention(nn.Module):
    """Causal self-attention with H query heads and Hkv key-value heads, rotary positions and a cache."""

    def __init__(self, config: Aquila2Config, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.backend = layer, config.head_dim, config.attn_backend
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = linear(config, config.hidden_size, queries)
        self.k_proj = linear(config, config.hidden_size, keys)
        self.v_proj = linear(config, config.hidden_size, keys)
        self.o_proj = linear(config, queries, config.hidden_size)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, H * D) -> (B, H, T, D)."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        cache: Cache | None,
        want_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Lets every token look at those before it.

        Args:
            x: (B, T, C).
            rotary: cosine and sine, (B, 1, T, D / 2) each.
            mask: what `aquila2_tut.model.attention` takes. A tensor carries causality itself; otherwise it is added.
            cache: holds the keys and values of earlier tokens, and is given the new ones.
            want_weights: also return the attention weights.

        Returns:
            (B, T, C), and the weights (B, H, T, S) or None.
        """
        q, k = rotate(self._heads(self.q_proj(x)), *rotary), rotate(self._heads(self.k_proj(x)), *rotary)
        v = self._heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        if isinstance(mask, Documents):  # a static cache keeps room behind the tokens that there are
            k, v = (x[:, :, : mask.keys.shape[1]] for x in (k, v))
        causal = not isinstance(mask, Tensor)
        out = attention(q, k, v, causal=causal, mask=mask, backend=self.backend)
        weights = attention_weights(q, k, causal=causal, mask=mask) if want_weights else None
        return self.o_proj(out.transpose(1, 2).reshape(*x.shape[:2], -1)), weights


class DecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: Aquila2Config, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Mask = None,
        past_key_values: Cache | None = None,
        want_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x: (B, T, C) -> (B, T, C), and the attention weights (B, H, T, S) where wanted."""
        attended, weights = self.self_attn(self.input_layernorm(x), rotary, mask, past_key_values, want_weights)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), weights
