"""Figures that a notebook cannot measure itself: how the real Aquila2 models were pretrained, by what is published and
by arithmetic; and what scripts in `benchmarks/` found of fine-tuning: three methods with three seeds, and its speed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from .errors import TrainError


@dataclass(frozen=True)
class PublishedRun:
    """One pretraining run.

    Args:
        model: a preset.
        gpu, gpus: the card, and how many of them.
        peak: dense 16-bit operations a second that the card's data sheet promises.
        tensor_parallel, pipeline_parallel: over how many cards a layer, and the stack of layers, is spread.
        precision: of the products.
        length: tokens a sample.
        batch: samples a step.
        samples, warmup_samples: in all, and while the learning rate rises.
        learning_rate, final_learning_rate: the highest, and the last.
        init_std, norm_init: standard deviation of the first matrices, and the first weights of the norms.
        rate: tokens a second and GPU, measured by others.
        mfu: model FLOPs utilization as published with that rate; None if it was not.
        sources: where each figure comes from.
    """

    model: str
    gpu: str
    peak: float
    gpus: int
    tensor_parallel: int
    pipeline_parallel: int
    precision: str
    length: int
    batch: int
    samples: int
    warmup_samples: int
    learning_rate: float
    final_learning_rate: float
    init_std: float
    norm_init: float
    rate: float
    mfu: float | None
    sources: dict[str, str]

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.samples * self.length

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length

    @property
    def steps(self) -> float:
        """Steps, if every one has the full batch."""
        return self.samples / self.batch

    @property
    def gpu_hours(self) -> float:
        """GPUs times hours that the tokens take at the published rate."""
        return self.tokens / self.rate / 3600

    def flops(self, parameters: float) -> float:
        """Operations of the whole run: six a parameter and token, two forward and four backward.

        Source: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1; attention proper is not counted.
        """
        return 6 * parameters * self.tokens

    def utilization(self, parameters: float) -> float:
        """Which share of the peak the published rate makes use of, with so many parameters.

        Source: the definition of MFU in Chowdhery et al. 2022 (arXiv 2204.02311), without attention proper.
        """
        return 6 * parameters * self.rate / self.peak


def published_runs() -> dict[str, PublishedRun]:
    """The runs of `published.json`, by model."""
    rows = json.loads(resources.files(__package__).joinpath("published.json").read_text(encoding="utf-8"))["runs"]
    return {row["model"]: PublishedRun(**row) for row in rows}


def measured_methods(model: str) -> dict[str, Any]:
    """Full fine-tuning, LoRA and Q-LoRA of a small model, measured by `benchmarks/finetune_methods.py`.

    Args:
        model: "smollm2".

    Returns:
        The conditions; and of each method: trainable parameters, held-out loss in nats and share of right answers (mean
        and 95 % interval over the seeds), median seconds a step, peak bytes in all and beyond the loaded model, runs.

    Raises:
        TrainError: a model that was not measured.
    """
    rows = json.loads(resources.files(__package__).joinpath("methods.json").read_text(encoding="utf-8"))
    if model not in rows:
        raise TrainError(f"the methods were not measured on {model!r}; known: {', '.join(rows)}")
    return rows[model]


def measured_speed() -> dict[str, Any]:
    """Fine-tuning here against transformers' Trainer with peft, measured by `benchmarks/finetune.py`.

    Returns:
        The conditions, the data, and of each method "conversations" and "batch": both sides' figures and their ratios.
    """
    return json.loads(resources.files(__package__).joinpath("speed.json").read_text(encoding="utf-8"))


def measured_sweep() -> dict[str, Any]:
    """Adapters of several ranks, on several maps, over weights of 32, 8 and 4 bits, by `benchmarks/lora_sweep.py`.

    Returns:
        The conditions; and rows, each with "maps", "r", "bits", trained parameters, held-out loss in nats and share of
        right answers (mean and 95 % interval over the seeds), median seconds a step, peak bytes, and runs, one a seed.
    """
    return json.loads(resources.files(__package__).joinpath("lora_sweep.json").read_text(encoding="utf-8"))
