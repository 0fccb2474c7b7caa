"""Training: the loss that never holds all logits, LoRA by hand, and fine-tuning from a recipe.

`finetune` is imported when it is first used: transformers' Trainer costs a second.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aquila2_tut.train.adapters import load_lora, lora_state, merge_checkpoint, save_lora
from aquila2_tut.train.errors import TrainError
from aquila2_tut.train.lora import LoRALinear, add_lora, merge_all
from aquila2_tut.train.loss import causal_loss, chunked_cross_entropy

if TYPE_CHECKING:
    from aquila2_tut.train.finetuning import finetune
    from aquila2_tut.train.tuning import Tuning

__all__ = [
    "LoRALinear",
    "TrainError",
    "Tuning",
    "add_lora",
    "causal_loss",
    "chunked_cross_entropy",
    "finetune",
    "load_lora",
    "lora_state",
    "merge_all",
    "merge_checkpoint",
    "save_lora",
]

_LATER = {"finetune": "finetuning", "Tuning": "tuning"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return value
