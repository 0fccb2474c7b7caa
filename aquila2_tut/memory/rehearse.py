"""A training step rehearsed: the real code on tensors without numbers, every byte of it counted.

A 70B model takes no memory here and half a minute. What the rehearsal cannot see stands beside it with its source: the
CUDA context, the buffers of a library that is not called, and the workspace of kernels.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..config import Aquila2Config
from .allocator import reserved_bytes
from .setting import Setting, setting
from .stage import CUDA_KERNELS, CUDA_WORKSPACE, as_on_cuda, empty_model, extra_flops, furnish
from .step import make_batch, make_optimizer, train_step
from .tracker import Allocation, Moment, Tracker
from .unseen import bucket_bytes, cublas_bytes, gathered_bytes, outside_bytes

# Share of what a data sheet promises that is reached on average.
# Source: FlagPerf, fine-tuning Aquila2-7B on 8 A800: 51.3 % of the peak.
EFFICIENCY = 0.5


class Timed:
    """A step of a `setting` of which it is known how long it takes at the card's peak, `least_seconds`."""

    @property
    def seconds_per_step(self) -> float:
        """At `EFFICIENCY` of what each kernel could reach."""
        return self.least_seconds / EFFICIENCY

    @property
    def tokens_per_second(self) -> float:
        """Of one card."""
        return self.setting.batch_size * self.setting.seq_len / self.seconds_per_step


@dataclass(frozen=True)
class Rehearsal(Timed):
    """What came of it; bytes and seconds of one card.

    Args:
        setting: what was rehearsed.
        allocated_bytes: the most that tensors and buffers took at one time.
        breakdown: label -> bytes at that time; and the CUDA context.
        peak_op: the operator at which it was, its stage and its line.
        peak_at: its number.
        flops: floating-point operations of a step, those of recomputing included.
        moved_bytes: inputs and results of all operators, none of them fused.
        least_seconds: what a step takes if every kernel reaches the card's peak.
        top: the ten largest allocations at the peak.
        timeline: one moment for each operator.
        reserved_bytes: as `peak_bytes`, with all that the caching allocator has taken, by its own rules; more than
            is allocated, as blocks do not fit into each other. It gives back what it can before it gives up, so that a
            run that does not fit by this figure may still run, slowly.
    """

    setting: Setting
    allocated_bytes: int
    breakdown: dict[str, int]
    peak_op: Moment
    peak_at: int
    flops: int
    moved_bytes: int
    least_seconds: float
    top: list[Allocation]
    timeline: list[Moment]
    reserved_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most memory that the process takes, with the CUDA context and NCCL's buffers, without fragmentation."""
        return self.allocated_bytes + outside_bytes(self.setting)

    @property
    def fits(self) -> bool:
        """Whether it is there on the card."""
        return self.peak_bytes <= self.setting.card.usable

    def possible_in(self, seconds: float) -> bool:
        """Whether the arithmetic alone could be done in so many seconds, were the card's peak reached throughout."""
        return self.flops / self.setting.card.flops <= seconds

    def to_json(self) -> str:
        """All of it but the timeline."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found |= {name: getattr(self, name) for name in ("peak_bytes", "fits", "seconds_per_step", "tokens_per_second")}
        del found["timeline"]
        found["peak_op"] = self.peak_op._asdict()
        found["setting"] = {**dataclasses.asdict(self.setting), "model": self.setting.name}
        found["top"] = [dataclasses.asdict(allocation) for allocation in self.top]
        return json.dumps(found, indent=1, ensure_ascii=False)


def rehearse(
    model: str | Aquila2Config = "AquilaChat2-7B",
    method: str = "qlora",
    batch_size: int = 4,
    seq_len: int = 2048,
    gpu: str = "A100-80G",
    recipe: str = "default",
    **changes: Any,
) -> Rehearsal:
    """Rehearses a step of training.

    Args:
        model: a preset's name, or a configuration.
        method: "full", "lora" or "qlora".
        batch_size: rows on each card.
        seq_len: tokens a row.
        gpu: a key of `GPUS`.
        recipe: "default", this book's; "upstream", that of the original README.
        changes: fields of `Setting` to set otherwise.

    Raises:
        RehearsalError: a setting that makes no sense, or peft or bitsandbytes is missing.
    """
    fields = {"model": model, "method": method, "batch_size": batch_size, "seq_len": seq_len, "gpu": gpu}
    return rehearse_setting(setting(recipe, **fields, **changes))


def rehearse_setting(wanted: Setting) -> Rehearsal:
    """Rehearses a setting, see `rehearse`."""
    return _result(wanted, tracked(wanted))


def tracked(wanted: Setting, device: str = "cuda") -> Tracker:
    """The account of a rehearsal.

    Args:
        wanted: the setting.
        device: "cuda", for its kernels, its allocator's rounding and the buffers of its libraries; "cpu", for what
            `measured_step` measures there.
    """
    model = empty_model(wanted)
    if device == "cpu":
        tracker = Tracker(wanted.config.vocab_size, grain=int, flops=extra_flops())
        with FakeTensorMode():
            furnish(model, _like)
            follow(wanted, model, tracker)
        return tracker
    cuda = {"workspace": CUDA_WORKSPACE, "kernels": CUDA_KERNELS, "share": _shares(wanted)}
    tracker = Tracker(wanted.config.vocab_size, flops=extra_flops(), **cuda)
    with FakeTensorMode(), as_on_cuda(model, wanted):
        furnish(model, _like)
        follow(wanted, model, tracker, unseen=True)
    return tracker


def _shares(wanted: Setting) -> dict[str, int]:
    """Label -> among how many cards what carries it is divided."""
    shared = wanted.gpus if wanted.strategy else 1
    labels = (
        ("gradients", "optimizer", "weights") if wanted.strategy in ("zero3", "fsdp2") else ("gradients", "optimizer")
    )
    return dict.fromkeys(labels, shared)


def follow(wanted: Setting, model: nn.Module, tracker: Tracker, unseen: bool = False) -> None:
    """Runs a step of a setting under a tracker.

    Args:
        wanted: the setting.
        model: of tensors with or without numbers.
        tracker: gets the account of the step; the optimizer's states are there when it begins.
        unseen: whether the buffers of libraries that are not called count too.
    """
    with tracker.watching(model), tracker:
        tracker.stage = "before"
        if unseen:
            _hold_unseen(wanted, tracker)
        tracker.stage = "optimizer"
        optimizer = make_optimizer(wanted, model)
        tracker.begin()

        def stage(name: str) -> None:
            if name == "optimizer":
                tracker.stage = name
            elif unseen and (size := bucket_bytes(wanted, trained_parameters(model))):
                tracker.hold(size, "buckets", "communication")  # DeepSpeed makes them when the backward pass begins

        train_step(wanted, model, make_batch(wanted), optimizer, stage)


def trained_parameters(model: nn.Module) -> int:
    """How many parameters are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


def _hold_unseen(wanted: Setting, tracker: Tracker) -> None:
    tracker.hold(cublas_bytes(wanted), "workspace", "cuBLAS")
    if gathered := gathered_bytes(wanted):
        tracker.hold(gathered, "buckets", "gathered weights")


def _result(wanted: Setting, tracker: Tracker) -> Rehearsal:
    """What an account says.

    Args:
        wanted: the setting.
        tracker: that followed it, see `tracked`.
    """
    card, (peak_op, alive, labels) = wanted.card, tracker.at_peak()
    return Rehearsal(
        setting=wanted,
        allocated_bytes=peak_op.bytes,
        breakdown={**labels, "context": outside_bytes(wanted)},
        peak_op=peak_op,
        peak_at=tracker.peak,
        flops=sum(work.flops for work in tracker.work),
        moved_bytes=sum(work.moved for work in tracker.work),
        least_seconds=sum(card.least_seconds(*work) for work in tracker.work),
        top=alive[:10],
        timeline=tracker.moments,
        reserved_bytes=reserved_bytes(tracker.allocations, len(tracker.moments)) + outside_bytes(wanted),
    )
