"""The production path: transformers' Trainer, with what it lacks for these models.

The loss never holds all logits, a checkpoint is there as a whole or not at all, a run goes on by itself where it was
stopped, with the same data in the same order and the same dice, and the progress bar speaks of tokens. A checkpoint of
an FSDP run is an ordinary one. Several GPUs, DeepSpeed and everything else is transformers' own.

Copies and FSDP2 in two processes have been run on a CPU here, with the weights of one process. No way on several GPUs
has, nor has DeepSpeed.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed import DistError
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from ..data.packing import Row, Sample, collate
from .checkpoints import checkpoints, forget_unfinished, last_good, unfinished, written_whole
from .errors import TrainError
from .loss import causal_loss
from .sharding import load_optimizer, load_whole, save_optimizer, shard_on_cpu


class Aquila2Trainer(Trainer):
    """transformers' Trainer with the chunked loss and whole checkpoints.

    Args:
        model: an `Aquila2ForCausalLM`, or one that peft has wrapped.
        args: transformers' own arguments.
        rows: packed rows or samples, see `aquila2_tut.data.packing`.
        options: whatever else Trainer takes.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, rows: Sequence[Row | Sample], **options: Any) -> None:
        pad = getattr(model.config, "pad_token_id", None) or 0
        super().__init__(model, args, train_dataset=rows, data_collator=lambda items: collate(items, pad), **options)
        self._staging: Path | None = None
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(Progress(args.disable_tqdm))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The mean over the labelled tokens of all batches of a step, in all processes; no logits."""
        loss = causal_loss(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # their gradients are averaged, and the count is of all
        return (loss, {"loss": loss}) if return_outputs else loss

    def resume_or_train(self) -> None:
        """Trains; goes on from the last checkpoint in `output_dir` if there is one."""
        folder = Path(self.args.output_dir)
        if self.args.should_save:
            forget_unfinished(folder)
        found = checkpoints(folder)
        state = TrainerState.load_from_json(str(found[-1] / TRAINER_STATE_NAME)) if found else None
        if state and (state.global_step >= state.max_steps or _was_stopped(state)):
            # transformers would take one step more than was asked for, or all that an early stop has left out.
            best = state.best_global_step if self.args.load_best_model_at_end else None
            self._load_from_checkpoint(str(folder / f"checkpoint-{best}" if best else found[-1]))
            self.state = state
        else:
            with _told_of_lost_process(folder):
                self.train(resume_from_checkpoint=str(found[-1]) if found else None)

    # --- sharded weights ---------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers', and on CPUs FSDP is FSDP too."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args and not self.is_fsdp_enabled:
            shard_on_cpu(self.accelerator, FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
            self.is_fsdp_enabled = self.accelerator.distributed_type == DistributedType.FSDP

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        main, folder = self.args.should_save, Path(output_dir)
        save_optimizer(self.optimizer, folder / OPTIMIZER_NAME, main)
        if main:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        return None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(self.optimizer, self.model, Path(checkpoint) / OPTIMIZER_NAME)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return load_whole(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_best_model()
        return load_whole(self.model, Path(self.state.best_model_checkpoint))

    # --- whole checkpoints -------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))
        target = folder / f"checkpoint-{self.state.global_step}"
        if not self.args.should_save:  # another process of this machine does the moving
            self._save_into(unfinished(target), model, trial)
            return self._name_best(folder)
        with written_whole(target) as place:
            self._save_into(place, model, trial)
            for file in (place / target.name).iterdir():
                os.replace(file, place / file.name)
            (place / target.name).rmdir()
            self._name_best(folder)
            self.state.save_to_json(str(place / TRAINER_STATE_NAME))
        rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)
        return None

    def _save_into(self, place: Path, model: nn.Module, trial: Any) -> None:
        """Each process writes its own dice, and what else it has, once the folder is there."""
        self.accelerator.wait_for_everyone()
        self._staging = place
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()

    def _name_best(self, folder: Path) -> None:
        """transformers has looked for the best checkpoint where this one was being written."""
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{self.state.best_global_step}")


@contextlib.contextmanager
def _told_of_lost_process(folder: Path) -> Iterator[None]:
    """Says in a line what a process sees of the end of another one; left to itself it is a page of calls.

    Raises:
        TrainError: another process of the run is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        raise TrainError(
            "another process of this run has ended: its own lines, or torchrun's list below, say of what. "
            f"{last_good(folder)}. The same command goes on from there"
        ) from error


def _was_stopped(state: TrainerState) -> bool:
    """Whether a checkpoint is the last one of a run that has ended, early or not."""
    control = state.stateful_callbacks.get("TrainerControl", {})
    return bool(control.get("args", {}).get("should_training_stop"))


class Progress(TrainerCallback):
    """A progress bar with the loss, tokens per second, memory and the time left; lines where stderr is no terminal.

    Args:
        silent: shows nothing.
        every: seconds between two lines.
    """

    def __init__(self, silent: bool = False, every: float = 30.0) -> None:
        self.silent, self.every, self.bar = silent, every, None
        self.loss, self.seen, self.begun, self.said = math.nan, 0, 0.0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by Trainer."""
        self.begun = self.said = time.monotonic()
        self.first, self.seen = state.global_step, state.num_input_tokens_seen
        if not self.silent and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by Trainer."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
            self.bar.set_postfix_str(self._figures(state), refresh=False)
        elif not self.silent and time.monotonic() - self.said > self.every:
            self.said = time.monotonic()
            left = (state.max_steps - state.global_step) / max(1e-9, self._rate(state.global_step - self.first))
            line = f"step {state.global_step}/{state.max_steps}  {self._figures(state)}  {_clock(left)} left"
            print(line, file=sys.stderr, flush=True)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kw: Any
    ) -> None:
        """Called by Trainer."""
        self.loss = (logs or {}).get("loss", self.loss)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by Trainer."""
        if self.bar is not None:
            self.bar.close()

    def _rate(self, amount: float) -> float:
        return amount / max(1e-9, time.monotonic() - self.begun)

    def _figures(self, state: TrainerState) -> str:
        tokens = self._rate(state.num_input_tokens_seen - self.seen)
        return f"loss {float(self.loss):.3f}  {tokens:,.0f} tokens/s{_memory()}"


def _memory() -> str:
    """The most memory that was in use: of the GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return f"  {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    if not find_spec("resource"):  # as on Windows
        return ""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return f"  {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB"


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
