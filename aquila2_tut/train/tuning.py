"""What a fine-tuning run is told: the fields of its recipe, and which of them do not go together."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from .recipe import FOLDER, Run, arguments

METHODS = ("full", "lora", "qlora")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw-8bit": "adamw_bnb_8bit",
    "adamw-paged": "paged_adamw_32bit",
    "adamw-paged-8bit": "paged_adamw_8bit",
}
SHARDINGS = ("zero2", "zero3", "fsdp2")
# What may be another when a run goes on, as long as a step has as many rows: how the processes share them.
SHARED_OUT = ("batch_size", "accumulation", "sharding")
_WHOLE_WEIGHTS = ("", "zero2")  # every process has all of the weights, and can answer a question


@dataclass(frozen=True)
class Tuning(Run):
    """How a model is fine-tuned on conversations.

    Args:
        base: the model to begin with: a name, a folder or a GGUF file, as `AutoLoader` takes them.
        model_dir: the folder that holds it, if it is not where `AutoLoader` looks.
        method: "full", "lora" or "qlora".
        data: a file of conversations, .json or .jsonl, or one of the book's samples.
        eval_data: another one, to be evaluated on; or
        eval_share: the share of `data` that is held out for it.
        eval_every: steps between two evaluations; 0 for once an epoch.
        patience: evaluations without a better loss after which to stop, and to take the best; 0 never stops early.
        template: the prompt format; "" for that of the model.
        steps: how often the weights move; 0 for `epochs`.
        epochs: how often all of the data is seen.
        batch_size: rows a step, each process and each time.
        accumulation: batches that make one step.
        warmup: steps to the highest learning rate; below 1 a share of all.
        packing: whether a row of `length` tokens holds several conversations.
        chunked_loss: whether the logits are made a few rows at a time.
        gradient_checkpointing: whether what lies between layers is computed a second time rather than kept.
        neftune: noise on the embeddings, 0 for none. Source: Jain et al. 2023 (arXiv 2310.05914).
        precision: "float32", "bfloat16" or "float16", of the products; what is learned is always float32.
        optimizer: a key of `OPTIMIZERS`.
        r, alpha, dropout: of the adapters.
        targets: the linear maps that get one: names, last parts of names, or "all-linear".
        also_train: maps that are trained as a whole and saved with the adapter, such as embed_tokens.
        rslora: divide alpha by the root of r. Source: Kalajdzievski 2023 (arXiv 2312.03732).
        dora: learn lengths and directions apart. Source: Liu et al. 2024 (arXiv 2402.09353).
        lora_plus: how many times faster B learns than A, 0 for as fast. Source: Hayou et al. 2024 (arXiv 2402.12354).
        ask: questions that the model answers while it is trained.
        ask_every: steps between two times.
        save_every: steps between two checkpoints; 0 for one an epoch. With `patience` they come with the evaluations.
        keep: checkpoints.
        log_every: steps between two lines of the log.
        tensorboard: whether TensorBoard gets the log too.
        sharding: how several processes share the work: "" for copies of everything, or one of `SHARDINGS`.
    """

    base: str = "Aquila2-Nano"
    model_dir: str = ""
    method: str = "lora"
    data: str = ""
    eval_data: str = ""
    eval_share: float = 0.0
    eval_every: int = 0
    patience: int = 0
    template: str = ""
    steps: int = 0
    epochs: float = 1.0
    accumulation: int = 1
    warmup: float = 0.1
    packing: bool = False
    chunked_loss: bool = True
    gradient_checkpointing: bool = False
    neftune: float = 0.0
    optimizer: str = "adamw"
    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    also_train: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    lora_plus: float = 0.0
    ask: tuple[str, ...] = ()
    ask_every: int = 0
    keep: int = 2
    log_every: int = 10
    tensorboard: bool = False
    sharding: str = ""

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.eval_data or self.eval_share)

    @property
    def rows_a_step(self) -> int:
        """Rows that move the weights once, in all processes together."""
        return self.batch_size * self.accumulation * world_size()

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return PRECISIONS[self.precision]

    def faults(self) -> Iterator[tuple[str, str]]:
        """What makes no sense here, or not together: the field, and what is wrong with it."""
        yield from self._wrong_words()
        yield from self._wrong_numbers()
        yield from self._wrong_pairs()
        yield from self._missing_hardware()

    def _wrong_words(self) -> Iterator[tuple[str, str]]:
        known = {"method": METHODS, "precision": PRECISIONS, "optimizer": OPTIMIZERS, "sharding": ("", *SHARDINGS)}
        for field, words in {**known, "schedule": ("cosine", "linear")}.items():
            if getattr(self, field) not in words:
                yield field, f"{getattr(self, field)!r} is not one of {', '.join(filter(None, words))}"
        for field in ("base", "data"):
            if not getattr(self, field):
                yield field, "a name or a file is needed"
        for field in ("targets", "also_train", "ask"):
            if not all(isinstance(word, str) for word in getattr(self, field)):
                yield field, f"a list of words is needed, not {list(getattr(self, field))!r}"

    def _wrong_numbers(self) -> Iterator[tuple[str, str]]:
        above_zero = ("length", "batch_size", "accumulation", "epochs", "learning_rate", "r", "alpha", "keep")
        not_below = ("steps", "warmup", "neftune", "eval_every", "patience", "ask_every", "save_every", "weight_decay")
        for field in (*above_zero, "log_every", *not_below, "lora_plus", "clip"):
            value, least = getattr(self, field), "above 0" if field in (*above_zero, "log_every") else "0 or above"
            if not 0 <= value < math.inf or (value == 0 and least == "above 0"):
                yield field, f"must be {least}, not {value!r}"
        for field in ("eval_share", "dropout", "final_share"):
            if not 0 <= getattr(self, field) < 1:
                yield field, f"must be 0 or above and below 1, not {getattr(self, field)!r}"
        if len(self.betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in self.betas):
            yield "betas", f"two numbers of 0 or above and below 1 are needed, not {list(self.betas)!r}"
        if not 0 <= self.seed < 2**32:
            yield "seed", f"must be 0 or above and below 2**32, not {self.seed!r}"

    def _wrong_pairs(self) -> Iterator[tuple[str, str]]:
        for field in ("also_train", "rslora", "dora", "lora_plus"):
            if self.method == "full" and getattr(self, field):
                yield field, "method full trains all weights and has no adapters: method lora or qlora, or leave it out"
        if self.method != "full" and not self.targets:
            yield "targets", f"method {self.method} needs linear maps to adapt, such as [q_proj, v_proj]"
        if 0 < self.lora_plus < 1:
            yield "lora_plus", "a ratio of 1 or above (16 is usual), or 0"
        if self.method == "qlora" and self.sharding not in _WHOLE_WEIGHTS:
            yield (
                "sharding",
                f"{self.sharding} splits weights, which bitsandbytes' four bits do not bear: zero2, or none",
            )
        if self.sharding == "fsdp2" and self.optimizer != "adamw":
            yield "optimizer", f"{self.optimizer} is bitsandbytes', which does not split its state as fsdp2 does: adamw"
        if self.ask and self.sharding not in _WHOLE_WEIGHTS:
            yield "ask", f"no process has all weights under {self.sharding}, so none can answer: leave it out"
        if self.eval_data and self.eval_share:
            yield "eval_share", "eval_data is given too: one of the two"
        for field in ("patience", "eval_every"):
            if getattr(self, field) and not self.evaluates:
                yield field, "nothing is held out to evaluate on: give eval_share or eval_data"

    def _missing_hardware(self) -> Iterator[tuple[str, str]]:
        if self.precision == "float16" and not torch.cuda.is_available():
            yield "precision", "float16 needs a GPU, and torch sees none here: bfloat16 or float32"
        if "paged" in self.optimizer and not torch.cuda.is_available():
            yield "optimizer", f"{self.optimizer} moves its state between GPU and host, and there is no GPU: adamw-8bit"
        if self.sharding.startswith("zero") and not find_spec("deepspeed"):
            yield "sharding", f"{self.sharding} needs DeepSpeed: pip install deepspeed, or take fsdp2"
        if (self.method == "qlora" or "bit" in self.optimizer or "paged" in self.optimizer) and not find_spec(
            "bitsandbytes"
        ):
            yield "method", "this needs bitsandbytes: pip install 'aquila2-tut[quant]'"


def tuning_arguments(recipe: Tuning, folder: Path) -> TrainingArguments:
    """A recipe in the terms of transformers.

    Args:
        recipe: how it goes.
        folder: gets the checkpoints.
    """
    return arguments(
        recipe,
        folder,
        num_train_epochs=recipe.epochs,
        gradient_accumulation_steps=recipe.accumulation,
        per_device_eval_batch_size=recipe.batch_size,
        bf16=recipe.precision == "bfloat16",
        fp16=recipe.precision == "float16",
        optim=OPTIMIZERS[recipe.optimizer],
        neftune_noise_alpha=recipe.neftune or None,
        report_to="tensorboard" if recipe.tensorboard else "none",
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,  # a loss that is no number ends the run
        save_total_limit=recipe.keep,
        label_names=["labels"],  # behind peft's wrapper Trainer does not find them
        ddp_find_unused_parameters=False,
        restore_callback_states_from_checkpoint=True,
        **_moments(recipe),
        **_sharding(recipe),
    )


def _moments(recipe: Tuning) -> dict[str, Any]:
    """When to evaluate and when to save."""
    save = recipe.eval_every if recipe.patience else recipe.save_every
    moments = {"save_strategy": "steps" if save else "epoch", "save_steps": save or 1}
    if recipe.evaluates:
        moments |= {"eval_strategy": "steps" if recipe.eval_every else "epoch", "eval_steps": recipe.eval_every or None}
    if recipe.patience:
        moments |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    return moments


def _sharding(recipe: Tuning) -> dict[str, Any]:
    config = str(FOLDER / f"{recipe.sharding}.json")
    if recipe.sharding == "fsdp2":  # a single process has nobody to share with
        return {"fsdp": True, "fsdp_config": config} if world_size() > 1 else {}
    return {"deepspeed": config} if recipe.sharding else {}


def world_size() -> int:
    """How many processes torchrun has started, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))
