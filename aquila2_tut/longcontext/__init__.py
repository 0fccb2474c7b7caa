"""Long texts: how far a model sees, how well, and what it costs."""

from aquila2_tut.longcontext.errors import LongContextError
from aquila2_tut.longcontext.longbench import LONG_TASKS, read_items, run_task, scores_by_length, task_score
from aquila2_tut.longcontext.passkey import Answer, Item, Maker, accuracy, ask, make_items
from aquila2_tut.longcontext.perplexity import Band, Encoded, by_context, by_position, encode

__all__ = [
    "LONG_TASKS",
    "Answer",
    "Band",
    "Encoded",
    "Item",
    "LongContextError",
    "Maker",
    "accuracy",
    "ask",
    "by_context",
    "by_position",
    "encode",
    "make_items",
    "read_items",
    "run_task",
    "scores_by_length",
    "task_score",
]
