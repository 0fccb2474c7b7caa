"""Figures that were measured once, with their conditions: `benchmarks/` writes the files, text and tests read them."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from .errors import QuantError

FILES = {"effect": "benchmarks/quantization.py", "speed": "benchmarks/quantized_decode.py"}


def measured(name: str) -> dict[str, Any]:
    """What a benchmark found.

    Args:
        name: "effect": what formats do to bits per byte and to choices; "speed": prefill and decoding on a CPU.

    Raises:
        QuantError: there is no such file.
    """
    if name not in FILES:
        raise QuantError(f"nothing is measured under the name {name!r}; known: {', '.join(FILES)}")
    return json.loads(resources.files(__package__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
