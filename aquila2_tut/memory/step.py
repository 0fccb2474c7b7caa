"""One step of training, as it is rehearsed and measured: the loss, the backward pass, the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn import functional as F

from ..quant.backends import need
from ..train.loss import causal_loss
from ..train.tuning import PRECISIONS
from .setting import Setting

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def plain_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """transformers' own: all logits, and once more in float32."""
    return model(**batch, use_cache=False).loss


def shifted_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """As it was in 2023: the logits in float32, and a copy of them without the last token of each row.

    Source: transformers 4.31, models/llama/modeling_llama.py, whose text the original's model shares.
    """
    logits = model(batch["input_ids"], use_cache=False).logits.float()
    scored = logits[:, :-1].contiguous()
    return F.cross_entropy(scored.flatten(0, 1), batch["labels"][:, 1:].flatten())


LOSS_FUNCTIONS: dict[str, Loss] = {"chunked": causal_loss, "plain": plain_loss, "shifted": shifted_loss}


class Masters:
    """AdamW on a copy in float32 of weights that are trained in half precision.

    Args:
        parameters: what is trained.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.copies = [parameter.detach().float() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.copies, foreach=True)

    def step(self) -> None:
        """Moves the copies, and rounds them into the weights."""
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            copy.grad = parameter.grad.float()
        self.optimizer.step()
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            parameter.data.copy_(copy)
            copy.grad = None

    def zero_grad(self) -> None:
        """Ends the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


Optimizer = torch.optim.Optimizer | Masters


def make_optimizer(wanted: Setting, model: nn.Module) -> Optimizer:
    """The optimizer of a setting, with its states: in a run they are there from the second step on."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if wanted.optimizer == "adamw-8bit":
        optimizer = _in_eight_bits(trained)
    else:
        optimizer = Masters(trained) if wanted.keeps_masters else torch.optim.AdamW(trained, fused=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _in_eight_bits(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    need("bitsandbytes")
    from bitsandbytes.optim import AdamW8bit

    with unset_fake_temporarily():  # it computes its levels, for which it needs numbers
        optimizer = AdamW8bit(trained)
    if isinstance(trained[0], FakeTensor):
        optimizer.name2qmap = {name: torch.empty(256) for name in optimizer.name2qmap}
    return optimizer


def autocast(wanted: Setting) -> AbstractContextManager:
    """Autocast to the precision of a setting."""
    dtype = PRECISIONS[wanted.precision]
    if not wanted.autocast or dtype == torch.float32:
        return nullcontext()
    return torch.autocast("cpu", dtype)


def make_batch(wanted: Setting) -> dict[str, Tensor]:
    """Rows of tokens that are all to be learned."""
    ids = torch.ones(wanted.batch_size, wanted.seq_len, dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone()}


def train_step(
    wanted: Setting,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer: Optimizer,
    stage: Callable[[str], None],
) -> None:
    """A step: forward, backward, the gradients' norm, and the weights move.

    Args:
        wanted: the setting.
        model: in training mode.
        batch: `input_ids` and `labels`, (B, T).
        optimizer: see `make_optimizer`.
        stage: is told "backward" and "optimizer" when they begin.
    """
    with autocast(wanted):
        loss = LOSS_FUNCTIONS[wanted.loss](model, batch)
    stage("backward")
    loss.backward()
    stage("optimizer")
    nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), 1.0)
    optimizer.step()
    optimizer.zero_grad()
