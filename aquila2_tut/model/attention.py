"""Scaled dot-product attention with grouped-query heads, behind one function.

Backends: "eager" is the formula, "sdpa" is torch's fused kernel, "auto" takes sdpa. In no backend are the key-value
heads repeated in memory where it can be avoided.

Source: Vaswani et al. 2017 (arXiv 1706.03762); grouped queries: Ainslie et al. 2023 (arXiv 2305.13245).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BACKENDS = ("auto", "eager", "sdpa")


class AttentionError(ValueError):
    """Shapes that do not fit together, or a backend that does not exist."""


def causal_mask(queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """Which keys each query may see when the last query stands at the last key.

    Returns:
        (T, S) bool, True where query i sees key j: j <= i + (S - T).
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def padding_mask(attention_mask: Tensor, past: int, queries: int) -> Tensor:
    """Joins a padding mask and causality.

    A query always sees itself, so that a row of padding has something to average: no NaN, no gradient of NaN.

    Args:
        attention_mask: (B, S), non-zero at real tokens; it covers the cached tokens, the new ones, and the room that a
            static cache keeps behind them.
        past: how many tokens are cached.
        queries: T, how many are new.

    Returns:
        (B, 1, T, S) bool.
    """
    seen = past + torch.arange(queries, device=attention_mask.device)[:, None]
    keys = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return ((keys <= seen) & attention_mask[:, None, None, :].bool()) | (keys == seen)


def attention_weights(q: Tensor, k: Tensor, *, causal: bool, mask: Tensor | None = None) -> Tensor:
    """The softmax of the scaled scores: how much each query takes from each key.

    Args:
        q: (B, H, T, D).
        k: (B, Hkv, S, D); query heads h * H / Hkv ... share key head h.
        causal: query i sees key j only where j <= i + (S - T).
        mask: None, or bool (True = visible) or additive float, that broadcasts to (B, H, T, S).

    Returns:
        (B, H, T, S); the softmax is taken in float32.
    """
    (batch, heads, queries, dim), keys = q.shape, k.shape[2]
    grouped = q.reshape(batch, k.shape[1], -1, dim)
    scores = (grouped @ k.transpose(2, 3)).view(batch, heads, queries, keys) * dim**-0.5
    if causal and queries > 1:
        scores = scores.masked_fill(~causal_mask(queries, keys, q.device), float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)


def _eager(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    weights = attention_weights(q, k, causal=causal, mask=mask)
    batch, heads, queries, keys = weights.shape
    return (weights.view(batch, v.shape[1], -1, keys) @ v).view(batch, heads, queries, v.shape[-1])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    if causal and 1 < queries < keys:
        # torch aligns its causal triangle with the first key, a cached call needs it aligned with the last.
        mask = _join(causal_mask(queries, keys, q.device), mask)
    elif causal and queries > 1 and mask is not None:
        mask = _join(causal_mask(queries, keys, q.device), mask)
    whole = causal and queries == keys and queries > 1 and mask is None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, enable_gqa=k.shape[1] != q.shape[1])


def _join(causal: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return causal
    return mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, float("-inf"))


def _check(q: Tensor, k: Tensor, v: Tensor, backend: str) -> None:
    if backend not in BACKENDS:
        raise AttentionError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise AttentionError(f"q (B, H, T, D), k and v (B, Hkv, S, D) expected, not {q.shape}, {k.shape}, {v.shape}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise AttentionError(f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}: B and D must agree, Hkv divide H")


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, head by head.

    Args:
        q: (B, H, T, D).
        k, v: (B, Hkv, S, D) with Hkv dividing H; S >= T, the first S - T keys come from a cache.
        causal: query i sees key j only where j <= i + (S - T).
        mask: None, or bool (True = visible) or additive float, that broadcasts to (B, H, T, S).
        backend: "auto", "eager" or "sdpa".

    Returns:
        (B, H, T, D).

    Raises:
        AttentionError: an unknown backend, or shapes that do not fit together.
    """
    _check(q, k, v, backend)
    return (_eager if backend == "eager" else _sdpa)(q, k, v, causal, mask)
