"""Data: the texts that models and vocabularies are trained and measured on, and the batches made of them.

The names below are imported when they are first used: checking a file needs neither a tokenizer nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aquila2_tut.data.conversations import check_file, read_conversations
    from aquila2_tut.data.corpora import SOURCES, Document, Source, dialogues, documents, parallel_sentences
    from aquila2_tut.data.findings import Finding
    from aquila2_tut.data.masking import MaskReport, encode_conversation, mask_report
    from aquila2_tut.data.packing import Row, collate, length_batches, pack_best_fit, pack_stream, padding_share
    from aquila2_tut.data.readers import DataError
    from aquila2_tut.data.splits import aligned_pairs, corpus
    from aquila2_tut.data.tasks import TASKS, Instance, extract_answer, generate, is_correct

_HOME = {
    "DataError": "readers",
    "Document": "corpora",
    "Finding": "findings",
    "Instance": "tasks",
    "MaskReport": "masking",
    "Row": "packing",
    "SOURCES": "corpora",
    "Source": "corpora",
    "TASKS": "tasks",
    "aligned_pairs": "splits",
    "check_file": "conversations",
    "collate": "packing",
    "corpus": "splits",
    "dialogues": "corpora",
    "documents": "corpora",
    "encode_conversation": "masking",
    "extract_answer": "tasks",
    "generate": "tasks",
    "is_correct": "tasks",
    "length_batches": "packing",
    "mask_report": "masking",
    "pack_best_fit": "packing",
    "pack_stream": "packing",
    "padding_share": "packing",
    "parallel_sentences": "corpora",
    "read_conversations": "conversations",
}

__all__ = [
    "SOURCES",
    "TASKS",
    "DataError",
    "Document",
    "Finding",
    "Instance",
    "MaskReport",
    "Row",
    "Source",
    "aligned_pairs",
    "check_file",
    "collate",
    "corpus",
    "dialogues",
    "documents",
    "encode_conversation",
    "extract_answer",
    "generate",
    "is_correct",
    "length_batches",
    "mask_report",
    "pack_best_fit",
    "pack_stream",
    "padding_share",
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
