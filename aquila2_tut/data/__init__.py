"""Data: the texts that models and vocabularies are trained and measured on.

The names below are imported when they are first used: checking a file needs neither a tokenizer nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aquila2_tut.data.conversations import check_file, read_conversations
    from aquila2_tut.data.corpora import DataError, dialogues, parallel_sentences
    from aquila2_tut.data.findings import Finding
    from aquila2_tut.data.masking import MaskReport, encode_conversation, mask_report

_HOME = {
    "DataError": "corpora",
    "Finding": "findings",
    "MaskReport": "masking",
    "check_file": "conversations",
    "dialogues": "corpora",
    "encode_conversation": "masking",
    "mask_report": "masking",
    "parallel_sentences": "corpora",
    "read_conversations": "conversations",
}

__all__ = [
    "DataError",
    "Finding",
    "MaskReport",
    "check_file",
    "dialogues",
    "encode_conversation",
    "mask_report",
    "parallel_sentences",
    "read_conversations",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
