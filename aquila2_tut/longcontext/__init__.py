"""Long texts: how far a model sees, how well, and what it costs."""

from aquila2_tut.longcontext.errors import LongContextError
from aquila2_tut.longcontext.longbench import LONG_TASKS, read_items, run_task, scores_by_length, task_score

__all__ = ["LONG_TASKS", "LongContextError", "read_items", "run_task", "scores_by_length", "task_score"]
