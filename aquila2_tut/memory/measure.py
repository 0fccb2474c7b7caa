"""The same account from a real run: what was alive, operator by operator, and what the system saw.

On a CPU a dispatch mode follows every storage, as in a rehearsal, and the resident set tells what the process took. On
CUDA the allocator's own counters stand beside. The part for CUDA is written from torch's documentation and has not been
run here, where there is no GPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model.layers import torch_products
from .errors import RehearsalError
from .rehearse import follow
from .setting import Setting
from .stage import empty_model, extra_flops, furnish
from .tracker import Allocation, Moment, Tracker

_HISTORY = 100_000  # entries; a step of a 70B makes and frees twenty thousand blocks, three entries each


@dataclass
class Measurement:
    """What a run took, in bytes; filled when `measure` is left.

    Args:
        tracker: the account.
        peak_bytes: the most that was alive at one time.
        breakdown: label -> bytes at that time.
        peak_op: the operator at which it was, its stage and its line.
        top: the ten largest allocations at that time.
        resident_bytes: the most that the process had in memory.
        cuda: of the allocator on CUDA, "allocated" and "reserved" at most, and "device", what is taken of the card now
            by all processes. Empty without a GPU.
    """

    tracker: Tracker
    peak_bytes: int = 0
    breakdown: dict[str, int] = field(default_factory=dict)
    peak_op: Moment | None = None
    top: list[Allocation] = field(default_factory=list)
    resident_bytes: int = 0
    cuda: dict[str, int] = field(default_factory=dict)

    def finish(self) -> None:
        """Reads the account."""
        self.peak_op, alive, self.breakdown = self.tracker.at_peak()
        self.peak_bytes, self.top = self.peak_op.bytes, alive[:10]


@contextlib.contextmanager
def measure(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    vocab_size: int | None = None,
    snapshot: Path | str | None = None,
) -> Iterator[Measurement]:
    """Measures what a block of code takes, one or more steps of training for instance.

    Args:
        model: whose weights, adapters and gradients are told apart.
        optimizer: whose states are, if it has any yet.
        vocab_size: tells logits; the model's own when not given.
        snapshot: file for the history of CUDA's allocator, to be opened at pytorch.org/memory_viz.

    Yields:
        What is filled in when the block ends.

    Raises:
        RehearsalError: a snapshot is asked for where there is no CUDA.
    """
    if snapshot is not None and not torch.cuda.is_available():
        raise RehearsalError(f"snapshot: {snapshot} cannot be written, as only CUDA's allocator has a history")
    config = getattr(model, "config", None)
    grain = {"grain": int} if next(model.parameters()).device.type == "cpu" else {}
    tracker = Tracker(vocab_size or getattr(config, "vocab_size", 0), flops=extra_flops(), **grain)
    found = Measurement(tracker)
    with tracker.watching(model), _resident(found), _cuda(found, snapshot), tracker:
        for state in optimizer.state.values() if optimizer is not None else ():
            for tensor in filter(torch.is_tensor, state.values()):
                tracker.adopt(tensor, "optimizer")
        yield found
    found.finish()


@contextlib.contextmanager
def _resident(found: Measurement, every: float = 0.01) -> Iterator[None]:
    """Looks at the resident set from a thread; the system's own maximum never falls again."""
    try:
        from psutil import Process
    except ImportError:
        yield
        return
    process, over = Process(), threading.Event()

    def look() -> None:
        while True:
            found.resident_bytes = max(found.resident_bytes, process.memory_info().rss)
            if over.wait(every):
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _cuda(found: Measurement, snapshot: Path | str | None) -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    if snapshot is not None:
        torch.cuda.memory._record_memory_history(max_entries=_HISTORY)
    try:
        yield
        torch.cuda.synchronize()
        if snapshot is not None:
            torch.cuda.memory._dump_snapshot(str(snapshot))
    finally:
        if snapshot is not None:
            torch.cuda.memory._record_memory_history(enabled=None)
    free, total = torch.cuda.mem_get_info()
    found.cuda = {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "device": total - free,
    }


def measured_step(wanted: Setting, on_onednn: bool = False) -> Tracker:
    """The account of a real step on the CPU, of a model with random weights.

    Args:
        wanted: its model must fit into memory, twice for Q-LoRA.
        on_onednn: whether products are oneDNN's, as in a run, or torch's, which a rehearsal has.
    """
    model = empty_model(wanted)
    furnish(model, lambda x: torch.randn(x.shape).mul_(0.02).to(x.dtype))
    tracker = Tracker(wanted.config.vocab_size, grain=int, flops=extra_flops())
    with contextlib.nullcontext() if on_onednn else torch_products():
        follow(wanted, model, tracker)
    return tracker


def difference(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """What another run takes less than one, label by label, the largest saving first: what did checkpointing save?

    Args:
        one, other: `breakdown` of two measurements or rehearsals.
    """
    less = {label: one.get(label, 0) - other.get(label, 0) for label in {**one, **other}}
    return dict(sorted(less.items(), key=lambda item: -item[1]))


class MemoryCallback(TrainerCallback):
    """Measures one step of transformers' Trainer.

    Args:
        step: which; the second by default, when the optimizer has its states.

    Attributes:
        found: the measurement, once the step is over.
    """

    def __init__(self, step: int = 2) -> None:
        self.step, self.found = step, None
        self._stack = contextlib.ExitStack()

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Called by Trainer."""
        if state.global_step + 1 == self.step:
            inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
            self.found = self._stack.enter_context(measure(model, inner))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by Trainer."""
        if self.found is not None:
            self.found.tracker.stage = "optimizer"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by Trainer."""
        self._stack.close()
