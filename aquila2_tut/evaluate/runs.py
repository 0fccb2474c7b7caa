"""An evaluation: suites of tasks put to a model through lm-eval, each with its figure and interval."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import lm_eval
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from aquila2_tut.evaluate.errors import EvaluateError
from aquila2_tut.evaluate.harness import HarnessModel
from aquila2_tut.evaluate.intervals import Estimate, bootstrap, wilson
from aquila2_tut.evaluate.suites import Suite


class Score(NamedTuple):
    """What came out of a suite.

    Attributes:
        name, title, metric, shots: see `Suite`.
        items: how many there were.
        value: in hundredths.
        low, high: its 95 % interval, which speaks of other items of the same kind.
    """

    name: str
    title: str
    metric: str
    shots: int
    items: int
    value: float
    low: float
    high: float


class OwnTask(ConfigurableTask):
    """A task of which no item is its own example; lm-eval sees to that only where both come from one split."""

    def fewshot_context(self, doc: Mapping[str, Any], num_fewshot: int, **given: Any) -> Any:
        """The examples, without the item itself, and the item."""
        examples = self.fewshot_docs() or []
        self.sampler.df = [one for one in examples if any(doc.get(field) != value for field, value in one.items())]
        return super().fewshot_context(doc, num_fewshot, **given)


def loaded(tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Configurations as lm-eval's tasks."""
    return TaskManager(include_defaults=False).load([OwnTask(config=dict(task)) for task in tasks])


def evaluate(
    model: HarnessModel, asked: Sequence[Suite], limit: int | None = None
) -> tuple[list[Score], dict[str, Any]]:
    """Put suites to a model.

    Args:
        model: ours, as lm-eval wants it.
        asked: from `suites`.
        limit: items of each task at most, to try something out.

    Returns:
        A score for each suite, and for each task what was asked and answered, item by item.

    Raises:
        EvaluateError: a request that the model cannot answer.
    """
    if limit is not None and limit < 1:
        raise EvaluateError(f"the limit is {limit} items: give 1 or more")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    samples: dict[str, Any] = {}
    for chat in (True, False):
        chosen = [task for suite in asked if _in_chat(suite, model) == chat for task in suite.tasks]
        if chosen:
            samples |= _samples(model, chosen, chat, limit)
    return [_score(suite, samples) for suite in asked], samples


def _in_chat(suite: Suite, model: HarnessModel) -> bool:
    return suite.chat and model.template is not None


def _samples(model: HarnessModel, tasks: list[dict[str, Any]], chat: bool, limit: int | None) -> dict[str, Any]:
    settings = {"limit": limit, "apply_chat_template": chat, "fewshot_as_multiturn": chat, "bootstrap_iters": 0}
    # lm-eval shows a bar of its own for each task and cannot be told not to.
    bars = contextlib.nullcontext() if model.progress else contextlib.redirect_stderr(io.StringIO())
    with bars:
        return lm_eval.evaluate(lm=model, task_dict=loaded(tasks), log_samples=True, **settings)["samples"]


def _score(suite: Suite, samples: Mapping[str, Any]) -> Score:
    by_task = [_values(samples[task["task"]], suite.metric) for task in suite.tasks]
    aggregate = _aggregate(suite)
    values = [value for own in by_task for value in own]
    if aggregate is not None:
        found = bootstrap(lambda drawn: aggregate([values[i] for i in drawn]), len(values), rounds=200)
    elif set(values) <= {0.0, 1.0}:
        found = Estimate(*(100 * part for part in wilson(int(sum(values)), len(values))))
    else:
        found = bootstrap(lambda drawn: 100 * sum(values[i] for i in drawn) / len(drawn), len(values))
    value = found.value
    if suite.by_subject:
        value = 100 * sum(sum(own) / len(own) for own in by_task) / len(by_task)
    return Score(suite.name, suite.title, suite.metric, suite.shots, len(values), value, found.low, found.high)


def _values(items: Iterable[Mapping[str, Any]], metric: str) -> list[Any]:
    """A task's values, item by item; with a filter as those of its first."""
    items = list(items)
    first = items[0]["filter"]
    return [item[metric] for item in sorted(items, key=lambda one: one["doc_id"]) if item["filter"] == first]


def _aggregate(suite: Suite) -> Any:
    """What makes one figure of pairs, if the figure is no mean."""
    (found,) = (metric for metric in suite.tasks[0]["metric_list"] if metric["metric"] == suite.metric)
    return found["aggregation"] if callable(found["aggregation"]) else None
