"""Data: the texts that models and vocabularies are trained and measured on."""

from aquila2_tut.data.corpora import DataError, dialogues, parallel_sentences

__all__ = ["DataError", "dialogues", "parallel_sentences"]
