"""FlashAttention-2 in Triton: attention, forward and backward, that never writes the T x S scores to memory.

A program (one instance of a kernel) holds one block of queries and walks over the keys it can see, block by block. The
softmax is kept up to date on the way: a running maximum m, a running total l, and an output that is rescaled whenever
the maximum grows. What is stored for the backward pass is one number a query, lse = m + log l, from which every weight
can be computed anew: p = exp(s - lse).

On a GPU Triton compiles these kernels. On a machine without one they run under Triton's interpreter, line by line in
numpy: thousands of times slower and the same arithmetic, so that they can be tested and stepped through anywhere. This
module is imported when the backend is first asked for, because it needs the triton package (Linux only).

The kernels have been run under the interpreter and compiled for GPUs; they have not been run or timed on a GPU.

Source: Dao 2023 (arXiv 2307.08691); Dao et al. 2022 (arXiv 2205.14135); online softmax: Milakov and Gimelshein 2018
(arXiv 1805.02867). Written for this book; what differs from the paper: two backward kernels, one by queries and one by
keys, so that no two programs add to the same number and the result is the same every time.
"""

from __future__ import annotations

import os

import numpy
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .documents import Documents, key_blocks, query_blocks

# Triton looks at this variable when a function is decorated, so it has to be set before the kernels below are read.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Triton decorates its own library when it is imported. torch may have done that before the variable was set, and then
# the interpreter cannot call these two; decorating them once more makes it independent of the order of imports.
_row_max, _row_sum = (triton.jit(f.fn) if INTERPRETED else f for f in (tl.max, tl.sum))


def interpreter_obstacle() -> str | None:
    """Why Triton's interpreter cannot run the kernels on this machine; None if it can."""
    versions = [tuple(map(int, x.__version__.split(".")[:2])) for x in (triton, numpy)]
    if not INTERPRETED:
        return "it is compiled for a GPU here (TRITON_INTERPRET=1 set at the start makes it run on a CPU)"
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        return "the interpreter of triton before 3.7 does not work with numpy from 2.4 on; upgrade triton"
    return None


# Names in the kernels: q_b, q_h and q_t are the strides of q from one row of the batch, head and token to the next, and
# so on for k, v and the output; the gradient of the output and dq lie as the output does. ids_q (B, T) and ids_k (B, S)
# number the documents. lse and delta are (B, H, T). blocks holds, for each block of a program, the first block of the
# other side that it must visit and one past the last (`documents.key_blocks`). BQ and BK are tokens a block.


@triton.jit
def _tile(x, rows, stride, count, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Loads rows of a (count, DIM) matrix. WIDTH is DIM rounded up to a power of two; zeros fill what is not there."""
    columns = tl.arange(0, WIDTH)
    there = (rows[:, None] < count) & (columns[None, :] < DIM)
    return tl.load(x + rows[:, None] * stride + columns[None, :], mask=there, other=0.0)


@triton.jit
def _store(x, tile, rows, stride, count, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Writes what `_tile` would read, in the number format of the destination."""
    columns = tl.arange(0, WIDTH)
    there = (rows[:, None] < count) & (columns[None, :] < DIM)
    tl.store(x + rows[:, None] * stride + columns[None, :], tile.to(x.dtype.element_ty), mask=there)


@triton.jit
def _scores(q, k, rows, columns, ids_q, ids_k, T, S, scale, CAUSAL: tl.constexpr):
    """One tile of q k^T / sqrt(D), with -inf where a query must not look."""
    # Numbers of documents are never negative: -1 and -2 match nothing, not even each other.
    own = tl.load(ids_q + rows, mask=rows < T, other=-1)
    other = tl.load(ids_k + columns, mask=columns < S, other=-2)
    visible = own[:, None] == other[None, :]
    if CAUSAL:
        visible = visible & (columns[None, :] <= rows[:, None] + (S - T))
    # "ieee": otherwise float32 is rounded to the 10 bits of TF32 on the way into the tensor cores.
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _forward(
    q, k, v, out, lse, ids_q, ids_k, blocks,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    H, Hkv, T, S, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: walks over the keys with the online softmax."""
    block, batch, head = tl.program_id(0), tl.program_id(1).to(tl.int64) // H, tl.program_id(1).to(tl.int64) % H
    kv_head = head // (H // Hkv)
    rows = block * BQ + tl.arange(0, BQ)
    k, v = k + batch * k_b + kv_head * k_h, v + batch * v_b + kv_head * v_h
    ids_q, ids_k = ids_q + batch * T, ids_k + batch * S
    bounds = blocks + 2 * (batch * tl.num_programs(0) + block)
    queries = _tile(q + batch * q_b + head * q_h, rows, q_t, T, DIM, WIDTH)

    # A finite start, so that a query which has seen nothing yet never computes -inf - (-inf).
    top = tl.full((BQ,), -1e30, tl.float32)
    total = tl.full((BQ,), 0.0, tl.float32)
    mixed = tl.full((BQ, WIDTH), 0.0, tl.float32)
    for j in range(tl.load(bounds), tl.load(bounds + 1)):
        columns = j * BK + tl.arange(0, BK)
        keys, values = _tile(k, columns, k_t, S, DIM, WIDTH), _tile(v, columns, v_t, S, DIM, WIDTH)
        s = _scores(queries, keys, rows, columns, ids_q, ids_k, T, S, scale, CAUSAL)
        new_top = tl.maximum(top, _row_max(s, 1))
        p, shrink = tl.exp(s - new_top[:, None]), tl.exp(top - new_top)
        total = total * shrink + _row_sum(p, 1)
        mixed = mixed * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        top = new_top

    total = tl.where(total > 0, total, 1.0)  # a query that sees no key at all: zeros come out
    _store(out + batch * o_b + head * o_h, mixed / total[:, None], rows, o_t, T, DIM, WIDTH)
    tl.store(lse + (batch * H + head) * T + rows, top + tl.log(total), mask=rows < T)


@triton.jit
def _weights_and_slopes(s, values, grad, lse, delta):
    """Recomputes one tile of the weights p, and of ds, the gradient of the scores: p * (dp - delta)."""
    p = tl.exp(s - lse[:, None])
    dp = tl.dot(grad, tl.trans(values), input_precision="ieee")
    return p, p * (dp - delta[:, None])


@triton.jit
def _backward_queries(
    q, k, v, grad, dq, lse, delta, ids_q, ids_k, blocks,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    H, Hkv, T, S, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries: sum over the keys of ds k."""
    block, batch, head = tl.program_id(0), tl.program_id(1).to(tl.int64) // H, tl.program_id(1).to(tl.int64) % H
    kv_head = head // (H // Hkv)
    rows = block * BQ + tl.arange(0, BQ)
    k, v = k + batch * k_b + kv_head * k_h, v + batch * v_b + kv_head * v_h
    ids_q, ids_k = ids_q + batch * T, ids_k + batch * S
    bounds = blocks + 2 * (batch * tl.num_programs(0) + block)
    queries = _tile(q + batch * q_b + head * q_h, rows, q_t, T, DIM, WIDTH)
    slope = _tile(grad + batch * o_b + head * o_h, rows, o_t, T, DIM, WIDTH)
    lse_rows = tl.load(lse + (batch * H + head) * T + rows, mask=rows < T, other=0.0)
    delta_rows = tl.load(delta + (batch * H + head) * T + rows, mask=rows < T, other=0.0)

    total = tl.full((BQ, WIDTH), 0.0, tl.float32)
    for j in range(tl.load(bounds), tl.load(bounds + 1)):
        columns = j * BK + tl.arange(0, BK)
        keys, values = _tile(k, columns, k_t, S, DIM, WIDTH), _tile(v, columns, v_t, S, DIM, WIDTH)
        s = _scores(queries, keys, rows, columns, ids_q, ids_k, T, S, scale, CAUSAL)
        _, ds = _weights_and_slopes(s, values, slope, lse_rows, delta_rows)
        total += tl.dot(ds.to(keys.dtype), keys, input_precision="ieee")
    _store(dq + batch * o_b + head * o_h, total * scale, rows, o_t, T, DIM, WIDTH)


@triton.jit
def _backward_keys(
    q, k, v, grad, dk, dv, lse, delta, ids_q, ids_k, blocks,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    H, Hkv, T, S, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys: sums over the queries of ds^T q and p^T do, for all heads that share the keys."""
    block, batch, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64) // Hkv, tl.program_id(1).to(tl.int64) % Hkv
    columns = block * BK + tl.arange(0, BK)
    ids_q, ids_k = ids_q + batch * T, ids_k + batch * S
    bounds = blocks + 2 * (batch * tl.num_programs(0) + block)
    keys = _tile(k + batch * k_b + kv_head * k_h, columns, k_t, S, DIM, WIDTH)
    values = _tile(v + batch * v_b + kv_head * v_h, columns, v_t, S, DIM, WIDTH)

    total_k = tl.full((BK, WIDTH), 0.0, tl.float32)
    total_v = tl.full((BK, WIDTH), 0.0, tl.float32)
    for head in range(kv_head * (H // Hkv), (kv_head + 1) * (H // Hkv)):
        for i in range(tl.load(bounds), tl.load(bounds + 1)):
            rows = i * BQ + tl.arange(0, BQ)
            queries = _tile(q + batch * q_b + head * q_h, rows, q_t, T, DIM, WIDTH)
            slope = _tile(grad + batch * o_b + head * o_h, rows, o_t, T, DIM, WIDTH)
            lse_rows = tl.load(lse + (batch * H + head) * T + rows, mask=rows < T, other=0.0)
            delta_rows = tl.load(delta + (batch * H + head) * T + rows, mask=rows < T, other=0.0)
            s = _scores(queries, keys, rows, columns, ids_q, ids_k, T, S, scale, CAUSAL)
            p, ds = _weights_and_slopes(s, values, slope, lse_rows, delta_rows)
            total_v += tl.dot(tl.trans(p).to(slope.dtype), slope, input_precision="ieee")
            total_k += tl.dot(tl.trans(ds).to(queries.dtype), queries, input_precision="ieee")
    _store(dk + (batch * Hkv + kv_head) * S * DIM, total_k * scale, columns, DIM, S, DIM, WIDTH)
    _store(dv + (batch * Hkv + kv_head) * S * DIM, total_v, columns, DIM, S, DIM, WIDTH)


def block_size(q: Tensor, longest: int) -> int:
    """Tokens a block, for queries and keys alike.

    On a GPU five tiles of block x D must fit into the memory of one multiprocessor (64 KiB before Ampere, 99 KiB or
    more since). The interpreter pays for each step and not for its size: a block as long as the sequence, up to 128.
    """
    if INTERPRETED:
        return min(128, max(16, triton.next_power_of_2(longest)))
    room = 16384 if torch.cuda.get_device_capability(q.device) >= (8, 0) else 4096
    return max(16, min(64, room // (triton.next_power_of_2(q.shape[-1]) * q.element_size())))


def _shape_of(q: Tensor, k: Tensor, causal: bool, block: int) -> dict[str, int | float | bool]:
    """The arguments that all three kernels share."""
    (_, heads, queries, dim), (_, kv_heads, keys, _) = q.shape, k.shape
    sizes = {"H": heads, "Hkv": kv_heads, "T": queries, "S": keys, "scale": dim**-0.5}
    blocks = {"WIDTH": max(16, triton.next_power_of_2(dim)), "BQ": block, "BK": block}
    # Loading the next tile while this one is multiplied takes room that float32 does not leave.
    return {**sizes, "CAUSAL": causal, "DIM": dim, **blocks, "num_stages": 1 if q.dtype == torch.float32 else 2}


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Batch, head and token stride of each."""
    return tuple(step for x in tensors for step in x.stride()[:3])


def _grid(x: Tensor, block: int) -> tuple[int, int]:
    """One program for each block of tokens of each head of each row."""
    return triton.cdiv(x.shape[2], block), x.shape[0] * x.shape[1]


def _ids(documents: Documents) -> tuple[Tensor, Tensor]:
    return documents.queries.int().contiguous(), documents.keys.int().contiguous()


class FlashAttention(torch.autograd.Function):
    """The three kernels as one differentiable operation; `flash_attention` calls it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, documents: Documents, causal: bool, block: int
    ) -> Tensor:
        """q (B, H, T, D), k and v (B, Hkv, S, D) -> (B, H, T, D)."""
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ranges = key_blocks(documents, causal=causal, query_block=block, key_block=block)
        shape = _shape_of(q, k, causal, block)
        with torch.cuda.device_of(q):
            _forward[_grid(q, block)](q, k, v, out, lse, *_ids(documents), ranges, *_strides(q, k, v, out), **shape)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.documents, ctx.causal, ctx.block = documents, causal, block
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, out, lse = ctx.saved_tensors
        grad = torch.empty_like(out).copy_(grad)  # in the strides of `out`, which the kernels are told
        # A weight's gradient flows back through the normalisation of its row: minus sum_j p_j dp_j, which is do . o.
        delta = (grad.float() * out.float()).sum(-1)
        dq, dk, dv = torch.empty_like(out), k.new_empty(k.shape), v.new_empty(v.shape)
        shape, strides = _shape_of(q, k, ctx.causal, ctx.block), _strides(q, k, v, out)
        sizes = {"causal": ctx.causal, "query_block": ctx.block, "key_block": ctx.block}
        common, inputs = (lse, delta, *_ids(ctx.documents)), (q, k, v, grad)
        with torch.cuda.device_of(q):
            grid, ranges = _grid(q, ctx.block), key_blocks(ctx.documents, **sizes)
            _backward_queries[grid](*inputs, dq, *common, ranges, *strides, **shape)
            grid, ranges = _grid(k, ctx.block), query_blocks(ctx.documents, **sizes)
            _backward_keys[grid](*inputs, dk, dv, *common, ranges, *strides, **shape)
        return dq, dk, dv, None, None, None


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, documents: Documents | None = None, block: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v without the T x S matrix, differentiable.

    Args:
        q: (B, H, T, D), float32, float16 or bfloat16; D at most 128.
        k, v: (B, Hkv, S, D) with Hkv dividing H.
        causal: query i sees key j only where j <= i + (S - T).
        documents: None, or which tokens belong together.
        block: tokens a block, a power of two from 16; `block_size` chooses when not given.

    Returns:
        (B, H, T, D); zeros where a query sees no key.
    """
    if documents is None:
        documents = Documents(*(x.new_ones(x.shape[0], x.shape[2], dtype=torch.int) for x in (q, k)))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    block = block or block_size(q, max(q.shape[2], k.shape[2]))
    if INTERPRETED and q.dtype == torch.bfloat16:
        # numpy has no bfloat16: the interpreter would multiply the bits as integers.
        return FlashAttention.apply(q.float(), k.float(), v.float(), documents, causal, block).to(q.dtype)
    return FlashAttention.apply(q, k, v, documents, causal, block)
