"""The training loop, to be read from top to bottom: what every trainer does, with nothing in between.

A step: take a batch, compute the loss, its gradients, clip them, move the weights. Around it: a learning rate that
rises and falls, a log, and checkpoints from which a run goes on exactly as if it had never been stopped.

`aquila2_tut.train.trainer` does the same with transformers' Trainer, for several GPUs and everything else it offers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data.packing import Row, collate
from .checkpoints import checkpoints, forget_unfinished, refuse_other_settings, written_whole
from .errors import TrainError
from .loss import causal_loss


@dataclass(frozen=True)
class Settings:
    """How a run goes.

    Args:
        steps: how often the weights move.
        batch_size: rows that are computed at once.
        accumulation: batches whose gradients are added up before a step.
        learning_rate: the highest; reached after `warmup` steps.
        schedule: "cosine", "linear" or "constant": how it falls from there, to `final_share` of it.
        weight_decay: pull of the matrices towards zero; norms are left alone.
        betas: memory of AdamW's two moving averages.
        clip: the largest norm of the gradients, over all weights.
        precision: "float32", or "bfloat16" for the products (the weights stay float32).
        seed: of the order of the data, and of dropout.
        save_every: steps between two checkpoints; 0 for none.
    """

    steps: int = 100
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup: int = 10
    schedule: str = "cosine"
    final_share: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    precision: str = "float32"
    seed: int = 42
    save_every: int = 0


@dataclass(frozen=True)
class Step:
    """What a step leaves in the log: the loss in nats per token, before the step, and the norm of the gradients."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int


def learning_rate(settings: Settings, step: int) -> float:
    """The learning rate of a step, counted from 0.

    Source: cosine: Loshchilov and Hutter 2017 (arXiv 1608.03983).
    """
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    falls = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
    if settings.schedule not in falls:
        raise TrainError(f"schedule: {settings.schedule!r} is not one of {', '.join(falls)}")
    return settings.learning_rate * (settings.final_share + (1 - settings.final_share) * falls[settings.schedule])


def batches(rows: Sequence[Row], settings: Settings, step: int, pad_id: int) -> Iterator[dict[str, Tensor]]:
    """The batches of a step. They follow from the seed and the step alone, so a resumed run needs no other memory.

    Every row comes once before any comes a second time; each round has an order of its own.
    """
    wanted = settings.batch_size * settings.accumulation
    places = [divmod(place, len(rows)) for place in range(step * wanted, (step + 1) * wanted)]
    orders = {round_: _order(len(rows), settings.seed + round_) for round_ in dict(places)}
    chosen = [rows[orders[round_][index]] for round_, index in places]
    for first in range(0, wanted, settings.batch_size):
        yield collate(chosen[first : first + settings.batch_size], pad_id)


def _order(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def adamw(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW over the weights that are trained, with decay for the matrices only.

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)


def train(
    model: nn.Module,
    rows: Sequence[Row],
    settings: Settings,
    folder: Path | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Trains a model in place.

    Args:
        model: an `Aquila2ForCausalLM`, or one with adapters; weights that need no gradient stay as they are.
        rows: the data, see `aquila2_tut.data.packing`.
        settings: how the run goes.
        folder: where checkpoints go; a run that was interrupted there goes on from its last one.
        on_step: is called with each step's log.

    Returns:
        The log, that of earlier runs in this folder included.

    Raises:
        TrainError: there are no rows, the loss is not a number, or the checkpoint is of a run with other settings.
    """
    if not rows:
        raise TrainError("there are no rows to train on")
    torch.manual_seed(settings.seed)
    optimizer = adamw(model, settings)
    log = _resume(folder, model, optimizer, settings) if folder else []
    model.train()
    for step in range(len(log), settings.steps):
        log.append(_one_step(model, optimizer, rows, settings, step))
        on_step(log[-1])
        if folder and settings.save_every and (step + 1) % settings.save_every == 0:
            _save(folder / f"checkpoint-{step + 1}", model, optimizer, settings, log)
    return log


def _one_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, rows: Sequence[Row], settings: Settings, step: int
) -> Step:
    """One step: the mean over all tokens of all its batches, and one move of the weights along it."""
    device, parts = next(model.parameters()).device, list(batches(rows, settings, step, model.config.pad_token_id or 0))
    tokens = sum(int((part["labels"] != -100).sum()) for part in parts)
    total = 0.0
    for part in parts:
        with _precision(settings, device):
            loss = causal_loss(model, {name: x.to(device) for name, x in part.items()}, num_items_in_batch=tokens)
        loss.backward()
        total += loss.item()
    if not math.isfinite(total):
        raise TrainError(f"step {step + 1}: the loss is {total}. Lower the learning rate, or look at this batch")
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(settings, step)
    optimizer.step()
    optimizer.zero_grad()
    return Step(step + 1, total, learning_rate(settings, step), float(norm), tokens)


def _precision(settings: Settings, device: torch.device) -> Any:
    if settings.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, settings.precision))


# --- checkpoints: weights, AdamW's averages, the state of chance, the log --------------------------------------------


def _save(
    target: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings, log: list[Step]
) -> None:
    with written_whole(target) as place:
        weights = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(weights, place / "weights.safetensors")
        state = optimizer.state_dict()["state"]
        save_file({f"{i}.{k}": v for i, own in state.items() for k, v in own.items()}, place / "optimizer.safetensors")
        save_file({"cpu": torch.get_rng_state()}, place / "chance.safetensors")
        content = {"settings": asdict(settings), "log": [asdict(step) for step in log]}
        (place / "run.json").write_text(json.dumps(content), encoding="utf-8")


def _resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings) -> list[Step]:
    """Puts everything back as the last checkpoint has it."""
    forget_unfinished(folder)
    found = checkpoints(folder)
    if not found:
        return []
    run = json.loads((found[-1] / "run.json").read_text(encoding="utf-8"))
    now = asdict(settings) | {"save_every": run["settings"]["save_every"]}  # it changes no weights
    refuse_other_settings(found[-1], run["settings"], now)
    model.load_state_dict(load_file(found[-1] / "weights.safetensors"), strict=False)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(found[-1] / "optimizer.safetensors").items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(load_file(found[-1] / "chance.safetensors")["cpu"])
    return [Step(**step) for step in run["log"]]
