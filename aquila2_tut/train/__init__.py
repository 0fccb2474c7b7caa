"""Training: the loss that never holds all logits, and LoRA by hand."""

from aquila2_tut.train.adapters import load_lora, lora_state, merge_checkpoint, save_lora
from aquila2_tut.train.errors import TrainError
from aquila2_tut.train.lora import LoRALinear, add_lora, merge_all
from aquila2_tut.train.loss import causal_loss, chunked_cross_entropy

__all__ = [
    "LoRALinear",
    "TrainError",
    "add_lora",
    "causal_loss",
    "chunked_cross_entropy",
    "load_lora",
    "lora_state",
    "merge_all",
    "merge_checkpoint",
    "save_lora",
]
