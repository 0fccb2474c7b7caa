"""The loss of a language model without its logits: a few rows of them at a time, none kept.

A vocabulary of 100,008 makes the logits of 4 x 2,048 tokens 3.3 GB in float32, and the ordinary loss holds two or three
tables of that size. Here the tokens go through the head in chunks. What the gradients need of a chunk is computed right
away, while its logits are there: the derivative of the loss by the logits is softmax minus one at the label, and two
products turn it into the gradients of the hidden states and of the head. Nothing is computed twice and no table
survives its chunk.

Source: the idea is that of the fused linear cross-entropy of Liger Kernel (Hsu et al. 2024, arXiv 2410.10989); Wijmans
et al. 2024 (arXiv 2411.09009) go further, and keep the logits within the processor's cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..model.costs import device_kind, has_values
from ..model.layers import Linear, product
from .errors import TrainError

# Bytes of a chunk's logits in float32. A CPU is as fast with few tokens at a time; a GPU wants more work at once.
_CPU_CHUNK, GPU_CHUNK = 1 << 26, 1 << 28
FEW_TOKENS = 128  # with fewer at a time the products get slower
_VOCABULARY_ROWS = 1 << 12  # of the head's gradient, added to at a time


class _Job(NamedTuple):
    """What to compute from: hidden (N, C), weight (V, C), labels (N,), the places of those that count; and in what."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    tokens: Tensor
    dtype: torch.dtype

    def chunks(self) -> tuple[Tensor, ...]:
        """The tokens in chunks of equal size: an eighth of them, but not too few and not too many."""
        budget = _CPU_CHUNK if device_kind(self.hidden) == "cpu" else GPU_CHUNK
        return self.tokens.split(chunk_size(len(self.tokens), len(self.weight), budget))


def chunk_size(tokens: int, vocab_size: int, budget: int = GPU_CHUNK) -> int:
    """Tokens of a chunk, the largest.

    Args:
        tokens: with a label.
        vocab_size: V.
        budget: bytes of a chunk's logits in float32; the default is that of a GPU.
    """
    at_once = max(1, min(budget // (4 * vocab_size), max(FEW_TOKENS, tokens // 8)))
    chunks = max(1, -(-tokens // at_once))
    return max(1, -(-tokens // chunks))


def chunked_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """What `F.cross_entropy(hidden @ head_weight.T, labels)` gives, and its gradients, without the (N, V) logits.

    Under autocast the products are made in its type; softmax and all sums over tokens, that of the head's gradient
    too, are in float32 in any case. For a head that is frozen no gradient is made.

    Args:
        hidden: (N, C).
        head_weight: (V, C).
        labels: (N,) integers.
        ignore_index: the label of tokens without loss. They get no logits either.
        reduction: the mean over the tokens with labels, or the sum.

    Returns:
        The loss in nats, a float32 scalar. 0 if there are no labels (torch's mean is nan then): a batch without answers
        teaches nothing, and must not ruin the weights.

    Raises:
        TrainError: shapes or types that do not fit together, or a label that is no token of the vocabulary.
    """
    if reduction not in ("mean", "sum"):
        raise TrainError(f'reduction must be "mean" or "sum", not {reduction!r}')
    if not torch.is_grad_enabled():
        hidden, head_weight = hidden.detach(), head_weight.detach()
    tokens = _labelled(labels, ignore_index)
    job = _Job(hidden, head_weight, labels, tokens, _product_type(hidden))
    _check(job)
    total = _SummedLoss.apply(*job)
    return total / max(1, len(tokens)) if reduction == "mean" else total


def _labelled(labels: Tensor, ignore_index: int) -> Tensor:
    """The places of the labels that count: all of them where labels have no values, as in a rehearsal."""
    if has_values(labels):
        return (labels != ignore_index).nonzero().flatten()
    return torch.arange(len(labels), device=labels.device)


def _product_type(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _check(job: _Job) -> None:
    hidden, weight, labels = job.hidden, job.weight, job.labels
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise TrainError(
            "hidden (N, C), head_weight (V, C) and labels (N,) expected, not "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if job.dtype == hidden.dtype != weight.dtype:
        raise TrainError(f"hidden is {hidden.dtype} and the head {weight.dtype}: cast one of them, or use autocast")
    if has_values(labels) and len(job.tokens):
        low, high = labels[job.tokens].aminmax()
        if low < 0 or high >= len(weight):
            wrong = int(low if low < 0 else high)
            at = int((labels == wrong).nonzero()[0])
            raise TrainError(f"label {wrong} at token {at} is not in the vocabulary, 0 to {len(weight) - 1}")


class _SummedLoss(torch.autograd.Function):
    """The sum of the losses; its forward pass leaves the gradients behind, and backward has only to scale them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels, tokens)
        ctx.dtype = dtype
        loss, ctx.gradients = _loss_and_gradients(_Job(hidden, weight, labels, tokens, dtype), ctx.needs_input_grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        job = _Job(*ctx.saved_tensors, ctx.dtype)
        # Given away, so that they can be scaled in place; a second pass (retain_graph) computes them anew.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = _loss_and_gradients(job, ctx.needs_input_grad)[1]
        scaled = [None if g is None else g.mul_(scale).to(x.dtype) for g, x in zip(gradients, job[:2], strict=True)]
        return *scaled, None, None, None


def _loss_and_gradients(job: _Job, wanted: tuple[bool, ...]) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Goes through the chunks once.

    Args:
        job: what to compute.
        wanted: whether the gradient of hidden is wanted, and that of the head; more than these is not looked at.

    Returns:
        The summed loss; and the gradients, (N, C) and (V, C), the latter in float32 as it is a sum over all chunks.
    """
    weight, wide = job.weight.to(job.dtype), torch.promote_types(job.dtype, torch.float32)
    loss = job.hidden.new_zeros((), dtype=wide)
    for_hidden = torch.zeros_like(job.hidden) if wanted[0] else None
    for_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    for tokens in job.chunks():
        loss += _chunk(job, weight, tokens, for_hidden, for_weight)
    return loss, (for_hidden, for_weight)


def _chunk(job: _Job, weight: Tensor, tokens: Tensor, for_hidden: Tensor | None, for_weight: Tensor | None) -> Tensor:
    """The summed loss of some tokens; adds their part to the gradients. Its tables end with it, before the next chunk.

    Args:
        job: what to compute.
        weight: (V, C) in the type of the products.
        tokens: (n,) places.
        for_hidden, for_weight: (N, C) and (V, C), or None where no gradient is wanted.
    """
    x = job.hidden[tokens].to(job.dtype)
    losses, errors = _losses_and_errors(product(x, weight), job.labels[tokens])
    if for_hidden is not None:
        for_hidden[tokens] = product(errors, weight.t()).to(for_hidden.dtype)
    if for_weight is not None:
        _add_product(for_weight, errors, x)
    return losses.sum()


def _losses_and_errors(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token, and its derivative by the logits: softmax, less one at the label.

    Args:
        logits: (n, V); overwritten if they are float32.
        labels: (n,).

    Returns:
        (n, 1) in float32, and (n, V) in the type of the logits.
    """
    scores, labels = logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[:, None]
    right, top = scores.gather(1, labels), scores.amax(1, keepdim=True)
    total = scores.sub_(top).exp_().sum(1, keepdim=True)
    scores.div_(total).scatter_(1, labels, scores.gather(1, labels) - 1)
    return top + total.log() - right, scores.to(logits.dtype)


def _add_product(to: Tensor, errors: Tensor, x: Tensor) -> None:
    """to += errors^T x, some rows of the vocabulary at a time, as the product needs a place of its own.

    Args:
        to: (V, C) in float32, also where the product is in half precision: sums of many chunks would lose too much.
        errors: (n, V).
        x: (n, C).
    """
    for rows, part in zip(to.split(_VOCABULARY_ROWS), errors.split(_VOCABULARY_ROWS, dim=1), strict=True):
        rows += product(part.t(), x.t())


def causal_loss(
    model: nn.Module, batch: Mapping[str, Tensor], num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """The loss of a batch: how well each labelled token is predicted from those before it.

    Args:
        model: an `Aquila2ForCausalLM`, or one that peft has wrapped.
        batch: what `collate` makes: `input_ids`, `labels` (not shifted) and, where there are any, `document_ids` or
            `attention_mask`, (B, T) each.
        num_items_in_batch: what the sum is divided by, where several batches make one step: the labelled tokens of all.

    Returns:
        The mean over the labelled tokens in nats, or the sum divided by `num_items_in_batch`.

    Raises:
        TrainError: there are no labels in the batch, or one is no token of the vocabulary.
    """
    if "labels" not in batch:
        raise TrainError(f"the batch has no labels, only {', '.join(sorted(batch))}")
    return model(**batch, head_loss=head_loss, num_items_in_batch=num_items_in_batch, use_cache=False).loss


def head_loss(head: nn.Module, hidden: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """The loss with a head that may be more than a matrix: with an adapter, or quantized. A model calls it in forward.

    Args:
        head: (..., C) -> (..., V).
        hidden: (N, C).
        labels: (N,), of the token to come, -100 where there is no loss.
        num_items_in_batch: see `causal_loss`.
    """
    if type(head) in (nn.Linear, Linear) and head.bias is None and "forward" not in vars(head):
        total = chunked_cross_entropy(hidden, head.weight, labels, reduction="sum")
    else:
        tokens = _labelled(labels, -100)
        total = F.cross_entropy(head(hidden[tokens]).float(), labels[tokens], reduction="sum")
    if num_items_in_batch is None:
        num_items_in_batch = (labels != -100).sum().clamp(min=1)
    return total / num_items_in_batch
