"""Data: the texts that models and vocabularies are trained and measured on."""

from aquila2_tut.data.corpora import DataError, dialogues, parallel_sentences
from aquila2_tut.data.tasks import TASKS, Instance, extract_answer, generate, is_correct

__all__ = [
    "TASKS",
    "DataError",
    "Instance",
    "dialogues",
    "extract_answer",
    "generate",
    "is_correct",
    "parallel_sentences",
]
