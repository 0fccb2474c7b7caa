"""Causal attention of many queries, block by block, where oneDNN multiplies: on a CPU, in float32, without gradients.

A block of queries is multiplied with just those keys that it may see, so that little above the diagonal is computed,
and no mask of T x S is made: not for a whole text, and not for a piece of one that stands behind S - T cached keys.
torch's fused kernel does the same for a whole text, with products that take twice as long as oneDNN's on the processor
this was written on (AMD EPYC, with torch's MKL); `benchmarks/long_prefill.py` shows what that comes to.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .products import for_onednn, product

_ROWS = 192  # of scores at a time: enough for the product, few enough to stay in a cache
_WIDTH = 256  # keys, to a multiple of which those of a block are rounded up
_LONG = 256  # queries from which it is worth while


def takes_blocks(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `block_attention` should compute this: many queries, in float32, on a CPU, and no gradient is wanted."""
    graded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return q.shape[2] >= _LONG and not graded and all(x.dtype == torch.float32 and for_onednn(x) for x in (q, k, v))


def block_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, where query i sees key j only if j <= i + (S - T).

    Args:
        q: (B, H, T, D).
        k, v: (B, Hkv, S, D) with Hkv dividing H.

    Returns:
        (B, H, T, D).
    """
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = q.shape, k.shape
    out, q, group = torch.empty_like(q), q * dim**-0.5, heads // kv_heads
    size = max(32, _ROWS // group)
    for row, head in itertools.product(range(batch), range(kv_heads)):
        shared = slice(head * group, (head + 1) * group)
        mine, own_k, own_v = q[row, shared], k[row, head].contiguous(), v[row, head].contiguous()
        for start in range(0, queries, size):
            end = min(start + size, queries)
            past = keys - queries + start
            # oneDNN keeps a program for each shape, half a megabyte or so: few widths, and some keys are masked.
            width = min(keys, -(-(past + end - start) // _WIDTH) * _WIDTH)
            out[row, shared, start:end] = _attend(mine[:, start:end], own_k[:width], own_v[:width], past)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
    """One block: queries (G, N, D) of G heads, the first of which stands at key `past` of (S, D) -> (G, N, D)."""
    (group, new, dim), keys = q.shape, k.shape[0]
    scores = product(q.reshape(-1, dim), k)
    future = torch.ones(new, keys - past, dtype=torch.bool).triu(1)
    scores.view(group, new, keys)[:, :, past:].masked_fill_(future, -math.inf)
    torch.softmax(scores, dim=-1, out=scores)
    return product(scores, v.t()).view(group, new, dim)
