"""Scaled dot-product attention with grouped-query heads, behind one function and in four ways.

"eager" is the formula. "sdpa" is torch's own fused kernel; long texts in float32 on a CPU, where no gradient is wanted,
go through oneDNN block by block instead (`blocks.py`), unless `torch_products` forbids it. "flash" is the flash-attn
package, on NVIDIA GPUs. "triton" is our kernel in `flash.py`, on a GPU or, slowly, in Triton's interpreter. They give
the same numbers; they differ in what they write to memory and where they run, and `choose_backend` says which is taken
and why. The key-value heads are not repeated in memory, but for sdpa with a mask on CUDA.

The flash backend has been tested against a stand-in of the package, not on a GPU.

Source: Vaswani et al. 2017 (arXiv 1706.03762); grouped queries: Ainslie et al. 2023 (arXiv 2305.13245).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .blocks import block_attention, takes_blocks
from .documents import AttentionError, Documents, causal_mask

Mask = Tensor | Documents | None


class Choice(NamedTuple):
    """A backend, and why it was taken."""

    backend: str
    reason: str


def attention_weights(q: Tensor, k: Tensor, *, causal: bool, mask: Mask = None) -> Tensor:
    """The softmax of the scaled scores: how much each query takes from each key.

    Args:
        q: (B, H, T, D).
        k: (B, Hkv, S, D); query heads h * H / Hkv ... share key head h.
        causal: query i sees key j only where j <= i + (S - T).
        mask: as `attention` takes it.

    Returns:
        (B, H, T, S); the softmax is taken in float32.
    """
    causal, mask = _dense(causal, mask)
    (batch, heads, queries, dim), keys = q.shape, k.shape[2]
    grouped = (q * dim**-0.5).reshape(batch, k.shape[1], -1, dim)  # scaled here, where it costs T x D and not T x S
    scores = (grouped @ k.transpose(2, 3)).view(batch, heads, queries, keys)
    if causal and queries > 1:
        scores = scores.masked_fill(~causal_mask(queries, keys, q.device), float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)


def _dense(causal: bool, mask: Mask) -> tuple[bool, Tensor | None]:
    """Documents written out as T x S truths, which then carry causality themselves."""
    if not isinstance(mask, Documents):
        return causal, mask
    return False, mask.visible_before if causal else mask.visible


def _eager(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Mask) -> Tensor:
    weights = attention_weights(q, k, causal=causal, mask=mask)
    batch, heads, queries, keys = weights.shape
    return (weights.view(batch, v.shape[1], -1, keys) @ v).view(batch, heads, queries, v.shape[-1])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Mask) -> Tensor:
    if causal and mask is None and takes_blocks(q, k, v):
        return block_attention(q, k, v)
    causal, mask = _dense(causal, mask)
    queries, keys = q.shape[2], k.shape[2]
    if causal and queries > 1 and (queries < keys or mask is not None):
        # torch aligns its causal triangle with the first key, a cached call needs it aligned with the last.
        mask = _join(causal_mask(queries, keys, q.device), mask)
    if mask is not None and q.is_cuda and k.shape[1] != q.shape[1]:
        # On CUDA torch has no fused kernel for shared heads and a mask: it would write out the scores instead.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    whole = causal and queries == keys and queries > 1 and mask is None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, enable_gqa=k.shape[1] != q.shape[1])


def _join(causal: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return causal
    return mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, float("-inf"))


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Documents | None) -> Tensor:
    package = importlib.import_module("flash_attn")
    batch, _, queries, _ = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # the package counts (B, T, H, D)
    if mask is None:
        return package.flash_attn_func(q, k, v, causal=causal).transpose(1, 2)
    query_order, key_order, *starts_and_longest = mask.ragged
    if not len(query_order):  # nothing but padding, which the package would stumble over
        return (q * 0).transpose(1, 2)
    rows = (x.flatten(0, 1).index_select(0, at) for x, at in ((q, query_order), (k, key_order), (v, key_order)))
    out = package.flash_attn_varlen_func(*rows, *starts_and_longest, causal=causal)
    padded = out.new_zeros(batch * queries, *out.shape[1:]).index_copy(0, query_order, out)
    return padded.unflatten(0, (batch, queries)).transpose(1, 2)


def _triton(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Documents | None) -> Tensor:
    from .flash import flash_attention  # here, because it imports triton, which not every machine has

    return flash_attention(q, k, v, causal=causal, documents=mask)


_RUN: dict[str, Callable[..., Tensor]] = {"eager": _eager, "sdpa": _sdpa, "flash": _flash, "triton": _triton}
BACKENDS = ("auto", *_RUN)
_DENSE_MASK = "it takes no T x S mask; `Documents` describe padding and packing to it"


def flash_obstacle(q: Tensor, mask: Mask = None) -> str | None:
    """Why the flash-attn package cannot run on these; None if it can.

    Source: the package's own statement of what it supports (Ampere or newer, half precision, D <= 256).
    """
    if not q.is_cuda:
        return f"it runs on CUDA devices, and the tensors are on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {_name(q.dtype)}"
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 (Ampere) or newer"
    if q.shape[-1] > 256:
        return f"it takes a head dimension of at most 256, not {q.shape[-1]}"
    return _DENSE_MASK if isinstance(mask, Tensor) else _import_obstacle("flash_attn", "pip install flash-attn")


def triton_obstacle(q: Tensor, mask: Mask = None) -> str | None:
    """Why our Triton kernel cannot run on these; None if it can."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {_name(q.dtype)}"
    if q.shape[-1] > 128:
        return f"it takes a head dimension of at most 128, not {q.shape[-1]}"
    if isinstance(mask, Tensor):
        return _DENSE_MASK
    kernel = f"{__package__}.flash"
    obstacle = _import_obstacle(kernel, "pip install triton (it exists for Linux)")
    return obstacle if obstacle or q.is_cuda else importlib.import_module(kernel).interpreter_obstacle()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _import_obstacle(module: str, remedy: str) -> str | None:
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch or CUDA, it fails in many ways
        return f"{error} ({remedy})"
    return None


def choose_backend(q: Tensor, mask: Mask = None, backend: str = "auto") -> Choice:
    """The backend that `attention` takes, and why.

    "auto" takes flash where it can run, and otherwise sdpa, which always can. It never takes the triton backend, which
    is there to be read.

    Args:
        q: (B, H, T, D); its device, its dtype and D decide.
        mask: as `attention` takes it.
        backend: a member of `BACKENDS`.

    Raises:
        AttentionError: no such backend, or one asked for by name that cannot run; the message says why.
    """
    if backend not in BACKENDS:
        raise AttentionError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    obstacles = {"auto": flash_obstacle, "flash": flash_obstacle, "triton": triton_obstacle}
    obstacle = obstacles[backend](q, mask) if backend in obstacles else None
    if backend == "auto":
        reason = f"flash cannot run: {obstacle}" if obstacle else f"flash can run: {q.device}, {_name(q.dtype)}"
        return Choice("sdpa" if obstacle else "flash", reason)
    if obstacle:
        raise AttentionError(f"backend {backend!r} cannot run: {obstacle}. The backends 'sdpa' and 'auto' always can")
    return Choice(backend, "asked for by name")


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Mask) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise AttentionError(f"q (B, H, T, D), k and v (B, Hkv, S, D) expected, not {q.shape}, {k.shape}, {v.shape}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise AttentionError(f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}: B and D must agree, Hkv divide H")
    if causal and q.shape[2] > k.shape[2]:
        raise AttentionError(
            f"{q.shape[2]} queries for {k.shape[2]} keys: causal attention needs a key for every query"
        )
    _check_mask(q, k, mask)


def _check_mask(q: Tensor, k: Tensor, mask: Mask) -> None:
    if isinstance(mask, Tensor) and not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise AttentionError(f"mask: bool (True = visible) or additive float expected, not {_name(mask.dtype)}")
    if isinstance(mask, Documents):
        have, want = [tuple(x.shape) for x in (mask.queries, mask.keys)], [(len(x), x.shape[2]) for x in (q, k)]
        if have != want:
            raise AttentionError(f"documents of queries and keys {have} do not fit (B, T) and (B, S) {want}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Mask = None,
    backend: str = "auto",
    explain: bool = False,
) -> Tensor | tuple[Tensor, Choice]:
    """softmax(q k^T / sqrt(D)) v, head by head.

    Args:
        q: (B, H, T, D).
        k, v: (B, Hkv, S, D) with Hkv dividing H; with `causal`, the first S - T keys come from a cache.
        causal: query i sees key j only where j <= i + (S - T).
        mask: None; or `Documents`, which say in every backend what is padding and what is packed together; or, for
            eager and sdpa, a tensor that broadcasts to (B, H, T, S), bool (True = visible) or additive float.
        backend: "auto", "eager", "sdpa", "flash" or "triton".
        explain: also return the `Choice` of the backend and the reason for it.

    Returns:
        (B, H, T, D), or that and a `Choice`.

    Raises:
        AttentionError: shapes that do not fit together, or a backend that is unknown or cannot run here.
    """
    _check(q, k, v, causal, mask)
    choice = choose_backend(q, mask, backend)
    out = _RUN[choice.backend](q, k, v, causal, mask)
    return (out, choice) if explain else out
