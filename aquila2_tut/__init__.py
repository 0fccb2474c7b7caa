"""The package that the Aquila2 tutorial is written with.

The names below are imported when they are first used: `import aquila2_tut` costs milliseconds, torch costs seconds.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aquila2_tut.config import PRESETS, Aquila2Config
    from aquila2_tut.loader import AutoLoader
    from aquila2_tut.model import Aquila2ForCausalLM
    from aquila2_tut.tokenizer import load_tokenizer

    __version__: str

# What the quantization libraries say when they are imported, and transformers imports them wherever they are: that a
# kernel for other hardware is not there, that they still call something by its old name. Nothing of it is for a reader.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions", "torchao"):
    logging.getLogger(_name).setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "is an Enum subclass" not in record.getMessage())

_HOME = {
    "AutoLoader": "aquila2_tut.loader",
    "Aquila2Config": "aquila2_tut.config",
    "Aquila2ForCausalLM": "aquila2_tut.model",
    "PRESETS": "aquila2_tut.config",
    "load_tokenizer": "aquila2_tut.tokenizer",
}

__all__ = ["PRESETS", "Aquila2Config", "Aquila2ForCausalLM", "AutoLoader", "__version__", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value = version("aquila2-tut")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
