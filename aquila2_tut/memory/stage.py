"""The stage of a rehearsal: the real model without numbers, and what a CPU has to pretend so as to pass for a GPU.

The model is built on the meta device and prepared by the code that `finetune` runs: peft's adapters, bitsandbytes' four
bits. Then every tensor gets memory, or under `FakeTensorMode` only the look of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.initialization import no_init_weights

from ..config import Aquila2Config
from ..model import Aquila2ForCausalLM
from ..model.costs import standing_for
from ..quant.backends import need
from ..quant.errors import QuantError
from ..quant.nf4 import SCALES_BLOCK
from ..train.finetuning import tunable
from ..train.lora import linears
from ..train.tuning import PRECISIONS
from .errors import RehearsalError
from .setting import Setting
from .tracker import Kernels, Work, Workspace

_BLOCK = 64  # weights that share a scale, bitsandbytes' own choice
aten = torch.ops.aten
_ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu.default"
_ATTENTION_BACKWARD = "aten._scaled_dot_product_flash_attention_for_cpu_backward.default"
_FOUR_BIT = "bitsandbytes.gemm_4bit.default"


# --- the model -------------------------------------------------------------------------------------------------------


def empty_model(wanted: Setting) -> nn.Module:
    """The model of a setting, prepared for training, on the meta device.

    Raises:
        RehearsalError: peft or bitsandbytes is missing, or there are no such targets.
    """
    config = Aquila2Config(**{**wanted.config.to_dict(), "attn_backend": "sdpa"})
    before = torch.get_default_dtype()
    torch.set_default_dtype(wanted.dtype)
    try:
        with torch.device("meta"), no_init_weights():
            bare = Aquila2ForCausalLM(config)
            bare.tie_weights()
            if wanted.method == "qlora":
                _put_into_four_bits(bare, PRECISIONS[wanted.precision])
            model = tunable(wanted.tuning(), bare, wanted.name)
    except (ValueError, QuantError) as error:
        raise RehearsalError(str(error)) from error
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(wanted.trained_dtype)
    return model


def _put_into_four_bits(model: nn.Module, dtype: torch.dtype) -> None:
    need("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    for name, module in linears(model).items():
        if name != "lm_head":
            size = module.in_features, module.out_features
            options = {"bias": False, "compute_dtype": dtype, "quant_type": "nf4"}
            model.set_submodule(name, Linear4bit(*size, **options).requires_grad_(False))


def furnish(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Gives every tensor of a model on the meta device memory, those that share it together.

    Args:
        model: changed in place.
        make: a tensor on the meta device -> one like it that is there. Matrices in four bits come in the size of
            their numbers.
    """
    done: dict[int, Tensor] = {}
    for module in list(model.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in done:
                    done[id(parameter)] = _furnished(parameter, make)
                module._parameters[name] = done[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = make(buffer)


def _furnished(parameter: nn.Parameter, make: Callable[[Tensor], Tensor]) -> nn.Parameter:
    if hasattr(parameter, "quant_state"):
        return _four_bits(parameter, make)
    return nn.Parameter(make(parameter), requires_grad=parameter.requires_grad)


def _four_bits(parameter: nn.Parameter, make: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """What bitsandbytes makes of a matrix when it is put on a device."""
    from bitsandbytes.functional import QuantState, quantize_4bit

    numbers = make(parameter)
    if type(numbers) is Tensor:
        codes, state = quantize_4bit(numbers, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
    else:
        codes, scales = numbers.new_empty(-(-numbers.numel() // 2), 1, dtype=torch.uint8), -(-numbers.numel() // _BLOCK)

        def wide(*size: int) -> Tensor:
            return numbers.new_empty(size, dtype=torch.float32)

        nested = QuantState(
            wide(-(-scales // SCALES_BLOCK)), code=wide(256), blocksize=SCALES_BLOCK, dtype=torch.float32
        )
        options = {"blocksize": _BLOCK, "quant_type": "nf4", "offset": wide(), "state2": nested}
        absmax = numbers.new_empty(scales, dtype=torch.uint8)
        state = QuantState(absmax, numbers.shape, wide(16), dtype=numbers.dtype, **options)
    stored = nn.Parameter(codes, requires_grad=False)
    stored.quant_state = state
    return stored


# --- the device ------------------------------------------------------------------------------------------------------


class _NormKernel(torch.autograd.Function):
    """RMSNorm as its CUDA kernel allocates: the result, and one number a token for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def _fused_rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
    return _NormKernel.apply(x, weight)


def _fused_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, training)[0] if p and training else x


@contextlib.contextmanager
def as_on_cuda(model: nn.Module, wanted: Setting) -> Iterator[None]:
    """Within the block a model on the CPU takes the ways that it would take on CUDA.

    The norm has a kernel of its own there, which keeps its input and one number a token; on a CPU torch computes it
    from parts, as code did everywhere before there was that kernel. Dropout keeps a byte a number there. peft asks
    CUDA, and not the CPU, about autocast.

    Args:
        model: prepared.
        wanted: tells of autocast and norms.
    """
    for module in model.modules():
        if wanted.autocast and type(module).__module__ == "peft.tuners.lora.bnb":
            module.cast_input_dtype_enabled = False
    composed, F.dropout = (F.rms_norm, F.dropout), _fused_dropout
    F.rms_norm = _fused_rms_norm if wanted.fused_norms else F.rms_norm
    try:
        with standing_for("cuda"):
            yield
    finally:
        F.rms_norm, F.dropout = composed


def _attention_backward_bytes(func: Any, args: tuple, out: Any) -> int:
    """The gradient of q is summed in float32, and one number a query beside it; those of k and v head by head.

    Source: flash-attention 2, csrc/flash_attn/flash_api.cpp, mha_bwd: dq_accum, softmax_d, dk_expanded, dv_expanded.
    """
    _, q, k = args[:3]
    batch, heads, queries, dim = q.shape
    padded = -(-queries // 128) * 128
    expanded = 2 * batch * heads * k.shape[2] * dim * k.element_size() if k.shape[1] != heads else 0
    return 4 * batch * heads * padded * (-(-dim // 32) * 32 + 1) + expanded


def _four_bit_product_bytes(func: Any, args: tuple, out: Any) -> int:
    """With many rows the weights are made anew, after their scales.

    Source: bitsandbytes 0.50, backends/cuda/ops.py, gemm_4bit.
    """
    weights = args[2][0] * args[2][1]
    return weights * args[0].element_size() + 4 * -(-weights // args[4])


CUDA_WORKSPACE: dict[str, Workspace] = {
    _ATTENTION_BACKWARD: _attention_backward_bytes,
    _FOUR_BIT: _four_bit_product_bytes,
}


def _four_bit_kernels(func: Any, args: tuple, out: Any, work: Work) -> tuple[Work, Work]:
    """Two on a GPU, once there are many rows: one reads codes and writes numbers, the next multiplies with them.

    Source: bitsandbytes 0.50, backends/cuda/ops.py, gemm_4bit.
    """
    codes, numbers = args[2][0] * args[2][1] // 2, _four_bit_product_bytes(func, args, out)
    return Work(0, codes + numbers), Work(work.flops, work.moved - codes + numbers)


CUDA_KERNELS: dict[str, Kernels] = {_FOUR_BIT: _four_bit_kernels}


def _attention_flops(q: tuple, k: tuple, causal: bool, products: int) -> int:
    batch, heads, queries, dim = q
    return products * 2 * batch * heads * queries * k[2] * dim // (2 if causal else 1)


def _forward_flops(q: Tensor, k: Tensor, v: Tensor, p: float = 0.0, causal: bool = False, **kwargs: Any) -> int:
    return _attention_flops(q.shape, k.shape, causal, 2)


def _backward_flops(g: Any, q: Tensor, k: Tensor, v: Any, o: Any, l: Any, p: float, causal: bool, **kwargs: Any) -> int:  # noqa: E741
    return _attention_flops(q.shape, k.shape, causal, 5)


def _four_bit_flops(x: Tensor, w: Tensor, shape: list[int], *args: Any, **kwargs: Any) -> int:
    return 2 * x.numel() * shape[0]


def extra_flops() -> dict[Any, Callable[..., int]]:
    """Formulas that torch has not: attention, whose kernel leaves out what lies above the diagonal, and four bits."""
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _forward_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_flops,
    }
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        formulas[torch.ops.bitsandbytes.gemm_4bit] = _four_bit_flops
    return formulas
