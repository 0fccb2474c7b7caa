"""What is rehearsed: a model, a method, a batch, a card, and how the run goes; and what of it makes no sense."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..config import Aquila2Config, ConfigError, resolve_preset_name
from ..train.tuning import METHODS, PRECISIONS, SHARDINGS, Tuning
from .errors import RehearsalError
from .hardware import GPU, GPUS

LOSSES = ("chunked", "plain", "shifted")
OPTIMIZERS = ("adamw", "adamw-8bit")
STRATEGIES = ("", *SHARDINGS)
_ABOVE_ZERO = ("batch_size", "seq_len", "gpus", "r")


@dataclass(frozen=True)
class Setting:
    """A training step on one card.

    Args:
        model: a preset's name, or a configuration.
        method: "full", "lora" or "qlora".
        batch_size: rows on each card.
        seq_len: tokens a row, all of them with a label and in one document.
        gpu: a key of `GPUS`.
        precision: of the products, a key of `train.tuning.PRECISIONS`.
        weights: of the weights that are not in four bits, the same.
        adapters: of the adapters, the same. Where what is trained is in half precision, the optimizer keeps a copy in
            float32, as DeepSpeed does.
        autocast: whether products are cast by torch's autocast; if not, everything is in the type of the weights.
        fused_norms: whether torch has a kernel for the norm, as it has on CUDA since 2.9.
        checkpointing: whether what is in a layer is computed a second time.
        loss: "chunked", this book's; "plain", transformers' today; "shifted", transformers' in 2023, which copies the
            logits in float32 without the last token of each row.
        optimizer: "adamw" or "adamw-8bit".
        r, targets, dropout: of the adapters.
        gpus: how many cards.
        strategy: what they share: "" for nothing, or one of `train.tuning.SHARDINGS`.
    """

    model: str | Aquila2Config = "AquilaChat2-7B"
    method: str = "qlora"
    batch_size: int = 4
    seq_len: int = 2048
    gpu: str = "A100-80G"
    precision: str = "bfloat16"
    weights: str = "bfloat16"
    adapters: str = "float32"
    autocast: bool = True
    fused_norms: bool = True
    checkpointing: bool = True
    loss: str = "chunked"
    optimizer: str = "adamw"
    r: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.05
    gpus: int = 1
    strategy: str = ""

    @property
    def config(self) -> Aquila2Config:
        """The shape of the model."""
        return self.model if isinstance(self.model, Aquila2Config) else Aquila2Config.preset(self.model)

    @property
    def name(self) -> str:
        """What to call the model."""
        return self.model if isinstance(self.model, str) else "custom"

    @property
    def card(self) -> GPU:
        """The card."""
        return GPUS[self.gpu]

    @property
    def dtype(self) -> torch.dtype:
        """Of what goes from layer to layer."""
        return PRECISIONS[self.weights]

    @property
    def trained_dtype(self) -> torch.dtype:
        """Of what is trained."""
        return PRECISIONS[self.weights if self.method == "full" else self.adapters]

    @property
    def keeps_masters(self) -> bool:
        """Whether the optimizer has a copy of what is trained, in float32."""
        return self.trained_dtype != torch.float32

    def tuning(self) -> Tuning:
        """The same as a recipe of `finetune`, for what prepares the model."""
        options = {"r": self.r, "alpha": 2 * self.r, "dropout": self.dropout, "targets": self.targets}
        return Tuning(method=self.method, gradient_checkpointing=self.checkpointing, **options)

    def faults(self) -> Iterator[str]:
        """What makes no sense: the field, and what to do."""
        known = {"method": METHODS, "loss": LOSSES, "optimizer": OPTIMIZERS, "strategy": STRATEGIES, "gpu": tuple(GPUS)}
        for field, words in {**known, **dict.fromkeys(("precision", "weights", "adapters"), tuple(PRECISIONS))}.items():
            if (value := getattr(self, field)) not in words:
                spelled = {word.lower(): word for word in words}
                near = [word for word in spelled if word.startswith(str(value).lower())]
                near = near or difflib.get_close_matches(str(value).lower(), spelled, 1, 0.5)
                hint = f"; did you mean {spelled[near[0]]}?" if near else ""
                yield f"{field}: {value!r} is not one of {', '.join(filter(None, words))}{hint}"
        for field in _ABOVE_ZERO:
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                yield f"{field}: must be a whole number of at least 1, not {value!r}"
        if not 0 <= self.dropout < 1:
            yield f"dropout: must be 0 or above and below 1, not {self.dropout!r}"
        if not self.autocast and self.precision != self.weights:
            yield f"precision: without autocast products are in the type of the weights, {self.weights}"

    def misfits(self) -> Iterator[str]:
        """What does not fit the model or does not go together, once each field makes sense by itself."""
        config = self.config
        if self.seq_len > config.context_length:
            yield f"seq_len: {self.seq_len} tokens, and the context of {self.name} holds {config.context_length}"
        narrowest = min(config.hidden_size, config.num_key_value_heads * config.head_dim)
        if self.method != "full" and self.r > narrowest:
            yield f"r: a rank of {self.r} is above the narrowest map of {self.name}, {narrowest} wide"
        if self.method == "qlora" and self.strategy not in ("", "zero2"):
            yield f"strategy: {self.strategy} splits weights, which bitsandbytes' four bits do not bear: zero2, or none"
        if self.strategy and self.gpus == 1:
            yield f"strategy: {self.strategy} shares among several cards, and gpus is 1"


# The original's scripts run under DeepSpeed, which casts the whole model to float16 in memory, adapters too, however
# they were loaded; then no autocast is left to do anything. Loaded and trained in float32, 7B would take 29.2 GB before
# the first activation. Source: A2:finetune/7B/*.sh, ds_zero2.config; DeepSpeed 0.10.2, `_configure_distributed_model`.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "upstream": {
        "precision": "float16",
        "weights": "float16",
        "adapters": "float16",
        "autocast": False,
        "fused_norms": False,
        "loss": "shifted",
        "gpus": 8,
        "strategy": "zero2",
    },
}
_OF_METHOD = {("default", "full"): {"weights": "float32", "optimizer": "adamw-8bit"}}


def setting(recipe: str = "default", **fields: Any) -> Setting:
    """A setting that makes sense.

    Args:
        recipe: a key of `RECIPES`, for the fields that are not given.
        fields: of `Setting`.

    Raises:
        RehearsalError: one that makes none; the message names the field.
    """
    if recipe not in RECIPES:
        raise RehearsalError(f"recipe: {recipe!r} is not one of {', '.join(RECIPES)}")
    known = Setting.__dataclass_fields__
    if strange := [name for name in fields if name not in known]:
        raise RehearsalError(f"{strange[0]}: a setting has no such field; it has {', '.join(known)}")
    method = fields.get("method", Setting.method)
    return checked(Setting(**{**RECIPES[recipe], **_OF_METHOD.get((recipe, method), {}), **fields}))


def setting_of(recipe: Tuning, config: Aquila2Config, processes: int = 1) -> Setting:
    """A recipe of `finetune` as a setting.

    Args:
        recipe: how the run goes.
        config: of the base model.
        processes: how many there are.
    """
    return Setting(
        model=config,
        method=recipe.method,
        batch_size=recipe.batch_size,
        seq_len=recipe.length,
        precision=recipe.precision,
        weights="float32" if recipe.method == "full" else recipe.precision,
        checkpointing=recipe.gradient_checkpointing,
        loss="chunked" if recipe.chunked_loss else "plain",
        optimizer="adamw-8bit" if "8bit" in recipe.optimizer else "adamw",
        r=recipe.r,
        targets=tuple(target.rpartition(".")[2] for target in recipe.targets),
        dropout=recipe.dropout,
        gpus=processes,
        strategy=recipe.sharding,
    )


def checked(wanted: Setting) -> Setting:
    """The setting, its model's name spelled as in `PRESETS`.

    Raises:
        RehearsalError: see `setting`.
    """
    for fault in wanted.faults():
        raise RehearsalError(fault)
    try:
        if isinstance(wanted.model, str):
            wanted = replace(wanted, model=resolve_preset_name(wanted.model))
    except ConfigError as error:
        raise RehearsalError(f"model: {error}") from None
    for fault in wanted.misfits():
        raise RehearsalError(fault)
    return wanted
