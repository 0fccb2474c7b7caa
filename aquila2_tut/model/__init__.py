"""The model, written to be read: `rope`, `attention`, `layers`, `modeling`, and `weights` that fills it."""

from .attention import attention, attention_weights
from .modeling import Aquila2ForCausalLM, Aquila2Model
from .rope import inverse_frequencies, rotary_tables, rotate

__all__ = [
    "Aquila2ForCausalLM",
    "Aquila2Model",
    "attention",
    "attention_weights",
    "inverse_frequencies",
    "rotary_tables",
    "rotate",
]
