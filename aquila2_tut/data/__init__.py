"""Data: the texts that models and vocabularies are trained and measured on."""

from aquila2_tut.data.corpora import SOURCES, Document, Source, dialogues, documents, parallel_sentences
from aquila2_tut.data.readers import DataError
from aquila2_tut.data.splits import aligned_pairs, corpus

__all__ = [
    "SOURCES",
    "DataError",
    "Document",
    "Source",
    "aligned_pairs",
    "corpus",
    "dialogues",
    "documents",
    "parallel_sentences",
]
