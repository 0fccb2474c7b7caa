"""Data: the texts that models and vocabularies are trained and measured on, and the batches made of them."""

from aquila2_tut.data.corpora import SOURCES, Document, Source, dialogues, documents, parallel_sentences
from aquila2_tut.data.packing import Row, collate, length_batches, pack_best_fit, pack_stream, padding_share
from aquila2_tut.data.readers import DataError
from aquila2_tut.data.splits import aligned_pairs, corpus
from aquila2_tut.data.tasks import TASKS, Instance, extract_answer, generate, is_correct

__all__ = [
    "SOURCES",
    "TASKS",
    "DataError",
    "Document",
    "Instance",
    "Row",
    "Source",
    "aligned_pairs",
    "collate",
    "corpus",
    "dialogues",
    "documents",
    "extract_answer",
    "generate",
    "is_correct",
    "length_batches",
    "pack_best_fit",
    "pack_stream",
    "padding_share",
    "parallel_sentences",
]
