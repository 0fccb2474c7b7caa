"""What a fine-tuning run has beyond `Aquila2Trainer`: it shows what it learns, answers meanwhile, ends in time."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..chat.templates import Template
from ..data.masking import IGNORED
from ..terminal import printable
from .checkpoints import last_good
from .errors import TrainError
from .loss import head_loss
from .sharding import stored_once
from .trainer import Aquila2Trainer
from .tuning import Tuning, tuning_arguments
from .tuning_data import TuningData, show_batch

_JUDGED_AT_ONCE = 256  # tokens: as many rows of logits


class Tuner(Aquila2Trainer):
    """The Trainer of a fine-tuning run.

    Args:
        model: with its adapters, if it has any.
        recipe: how it goes.
        data: what is learned.
        tokenizer: of the model.
        template: of the model.
        folder: gets the checkpoints.
        words: what is printed besides, in the reader's language: "first_batch", "asked".
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Tuning,
        data: TuningData,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        folder: Path,
        words: Mapping[str, str],
    ) -> None:
        held_out = data.held_out or None
        super().__init__(model, tuning_arguments(recipe, folder), data.train, eval_dataset=held_out)
        self.recipe, self.words, self.tokenizer = recipe, words, tokenizer
        self._shown = False
        if recipe.patience:
            self.add_callback(EarlyStoppingCallback(recipe.patience))
        if recipe.ask and recipe.ask_every and self.args.should_save:
            self.add_callback(Answers(recipe, tokenizer, template, words["asked"]))

    # --- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Chunk by chunk, or from all logits; the first batch is shown as it arrives here."""
        self._show_once(inputs)
        if self.recipe.chunked_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "use_cache": False}
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def _show_once(self, batch: Mapping[str, Tensor]) -> None:
        if self._shown or not self.args.should_save or self.state.global_step:
            return
        self._shown = True
        colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        shown = show_batch(batch, self.tokenizer, colour)
        print(self.words["first_batch"], *shown, sep="\n", file=sys.stderr, flush=True)

    def training_step(self, model: nn.Module, *arguments: Any, **options: Any) -> Tensor:
        """Ends the run at a loss that is no number, before the weights take it in.

        Raises:
            TrainError: it is none.
        """
        loss = super().training_step(model, *arguments, **options)
        self._check_number("loss", float(loss))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16:  # there the scale of the loss is found by trying, and bad steps are skipped
            self._check_number("gradient", float(norm))
        return norm

    def _check_number(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainError(
                f"the {what} is {value} at step {self.state.global_step + 1}. {last_good(Path(self.args.output_dir))}. "
                "Begin anew in another folder with a lower learning_rate, a longer warmup, or precision float32"
            )

    # --- the optimizer -----------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; with LoRA+ the B of each adapter learns faster than its A."""
        if self.optimizer is None and self.recipe.lora_plus:
            from peft.optimizers import create_loraplus_optimizer

            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            ratio, decay = self.recipe.lora_plus, self.args.weight_decay
            self.optimizer = create_loraplus_optimizer(
                self.model, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay, **options
            )
        return super().create_optimizer(model)

    # --- held-out loss -----------------------------------------------------------------------------------------------

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **options: Any) -> EvalLoopOutput:
        """As Trainer's, but every token counts the same; there it is every row, however little of it is learned.

        Beside the loss it gives `right`, the share of conversations of which every learned token was the likeliest one:
        a greedy decoder would have given the answer word by word.
        """
        self._sum = torch.zeros(4, dtype=torch.float64)
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **options)
        sums = self.accelerator.reduce(self._sum.to(self.args.device, torch.float32))
        loss, tokens, right, conversations = sums.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(1, tokens)
        output.metrics[f"{metric_key_prefix}_right"] = right / max(1, conversations)
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The mean loss of a batch; adds it to the sums."""
        inputs = self._prepare_inputs(inputs)
        judge = Judge()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs, head_loss=judge, use_cache=False).loss
        right = judge.right(inputs)
        count = int((inputs["labels"] != IGNORED).sum())
        self._sum += torch.tensor([float(loss) * count, count, sum(right), len(right)], dtype=torch.float64)
        return loss, None, None

    # --- what is kept ------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with _without_bars():
            if not hasattr(self.model, "peft_config"):
                super()._save(output_dir, state_dict and stored_once(self.model, state_dict))
            elif self.args.should_save:
                # Left to itself peft asks a hub on the network whether the vocabulary has grown.
                options = {"state_dict": state_dict, "save_embedding_layers": False}
                self.model.save_pretrained(output_dir or self.args.output_dir, **options)


class Judge:
    """The loss of a batch that is evaluated, and which of its labelled tokens are the likeliest ones."""

    def __call__(self, head: nn.Module, hidden: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """A model calls it in its forward pass, see `aquila2_tut.train.loss.head_loss`."""
        tokens = (labels != IGNORED).nonzero().flatten()
        self.hits = torch.ones_like(labels, dtype=torch.bool)
        for some in tokens.split(_JUDGED_AT_ONCE):
            self.hits[some] = head(hidden[some]).argmax(-1) == labels[some]
        return head_loss(head, hidden, labels, num_items_in_batch)

    def right(self, batch: Mapping[str, Tensor]) -> list[bool]:
        """For each conversation of the batch with anything to learn whether all of it was right.

        Args:
            batch: its `labels` and `document_ids`, (B, T).
        """
        labelled = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED) != IGNORED
        rows = torch.arange(len(labelled), device=labelled.device)[:, None].expand_as(labelled)
        named = torch.stack((rows[labelled], batch["document_ids"][labelled]))
        names, which = named.unique(dim=1, return_inverse=True)
        wrong = torch.zeros(names.shape[1], dtype=torch.bool, device=labelled.device)
        wrong[which[~self.hits.view_as(labelled)[labelled]]] = True
        return (~wrong).tolist()


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Without the bar of transformers for each file, in between our own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Answers(TrainerCallback):
    """The model's answers to a few questions, printed while it learns. They use no dice, so a run is the same without.

    Args:
        recipe: has the questions.
        tokenizer: of the model.
        template: of the model.
        words: a line with places for {step}, {question} and {answer}.
    """

    def __init__(self, recipe: Tuning, tokenizer: PreTrainedTokenizerBase, template: Template, words: str) -> None:
        self.recipe, self.tokenizer, self.template, self.words = recipe, tokenizer, template, words

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Called by Trainer."""
        if state.global_step % self.recipe.ask_every:
            return
        for question, answer in zip(self.recipe.ask, self.answers(model, self.recipe.ask), strict=True):
            line = self.words.format(step=state.global_step, question=question, answer=answer)
            print(printable(line), file=sys.stderr, flush=True)

    def answers(self, model: Any, questions: Sequence[str], most: int = 60) -> list[str]:
        """The likeliest answers.

        Args:
            model: bare, with an adapter, or wrapped once more by torch.
            questions: what to ask.
            most: tokens an answer.
        """
        bare = getattr(model, "module", model)
        options = {"tokenizer": self.tokenizer, "convo_template": self.template, "temperature": 0, "max_gen_len": most}
        with torch.no_grad(), torch.autocast(bare.device.type, self.recipe.dtype, self.recipe.dtype != torch.float32):
            return [bare.predict(question, **options) for question in questions]
