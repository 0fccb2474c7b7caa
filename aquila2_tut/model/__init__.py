"""The model, written to be read: `rope`, `attention`, `layers`, `modeling`, and `weights` that fills it.

Beside attention stand `documents` (padding and packing), `flash` (the Triton kernel, imported when first used) and
`costs` (what attention takes in arithmetic and memory).
"""

from .attention import attention, attention_weights
from .documents import Documents
from .modeling import Aquila2ForCausalLM, Aquila2Model
from .products import torch_products
from .rope import attention_factor, inverse_frequencies, rotary_tables, rotate

__all__ = [
    "Aquila2ForCausalLM",
    "Aquila2Model",
    "Documents",
    "attention",
    "attention_factor",
    "attention_weights",
    "inverse_frequencies",
    "rotary_tables",
    "rotate",
    "torch_products",
]
