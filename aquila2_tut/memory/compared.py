"""LoRA against Q-LoRA: what the four bits save, what making numbers of them again costs, and tables of both.

The tables are written by `benchmarks/lora_vs_qlora.py`, as a page has no time for forty rehearsals.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from ..config import Aquila2Config
from ..quant.sizes import linear_shapes, predicted_bytes
from .setting import Setting

_DONE_ANEW = 2  # a matrix is multiplied with in the forward pass and in the backward pass; checkpointing adds one


def linear_weights(config: Aquila2Config) -> int:
    """Weights of the linear maps of all layers: those that go into four bits."""
    return config.num_hidden_layers * sum(out * inputs for out, inputs in linear_shapes(config))


def saved_bytes(config: Aquila2Config, each: int = 2) -> int:
    """What the weights take less in NF4 with doubly quantized scales; no length or batch size is in it.

    Args:
        config: of the model.
        each: bytes of a weight beside LoRA.
    """
    stored = predicted_bytes(config, "nf4-dq")
    kept = stored.embedding + stored.head + stored.norms
    return each * linear_weights(config) - (stored.total - kept)


def penalty_seconds(wanted: Setting) -> float:
    """The least that making numbers of four bits costs in a step: codes are read and numbers are written, as fast as
    the memory can. Scales, an eighth of a bit a weight, are left out.

    Args:
        wanted: a setting; neither its length nor its batch size matters.
    """
    times = _DONE_ANEW + wanted.checkpointing
    return times * linear_weights(wanted.config) * (0.5 + wanted.dtype.itemsize) / wanted.card.bandwidth


def compared() -> dict[str, Any]:
    """The tables: "lengths", a row a length; "readme", a row a rehearsal of the README's runs; "published", time and
    memory that others have measured; "conditions".
    """
    return json.loads(resources.files(__package__).joinpath("lora_vs_qlora.json").read_text(encoding="utf-8"))
