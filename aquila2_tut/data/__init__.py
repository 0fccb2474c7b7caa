"""Data: the texts that models and vocabularies are trained and measured on, and the batches made of them."""

from aquila2_tut.data.corpora import DataError, dialogues, parallel_sentences
from aquila2_tut.data.packing import Row, collate, length_batches, pack_best_fit, pack_stream, padding_share

__all__ = [
    "DataError",
    "Row",
    "collate",
    "dialogues",
    "length_batches",
    "pack_best_fit",
    "pack_stream",
    "padding_share",
    "parallel_sentences",
]
