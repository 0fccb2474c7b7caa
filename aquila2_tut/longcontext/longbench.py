"""LongBench: 21 tasks over long texts in English, Chinese and code, read from local files or from the hub.

The prompts are this project's own words, the data's fields stand in them where the original's do. A prompt that is too
long loses its middle, as in the paper: what is asked stands at an end. How much was lost is told with each answer.

Source: Bai et al. 2023 (arXiv 2308.14508).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aquila2_tut.chat.templates import Template, plain_ids
from aquila2_tut.longcontext.errors import LongContextError
from aquila2_tut.longcontext.metrics import METRICS

HUB = ("zai-org/LongBench", "data.zip")
BANDS = {"0-4k": range(4000), "4-8k": range(4000, 8000), "8k+": range(8000, 1 << 62)}  # words, or Chinese characters
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # a model goes on with the next example after its answer


@dataclass(frozen=True)
class LongTask:
    """How one of the tasks is asked and scored.

    Args:
        name: a key of `LONG_TASKS`.
        language: "en", "zh" or "code".
        metric: a key of `METRICS`.
        tokens: the most that an answer may have.
        chat: whether the prompt is put into a chat model's template; examples to go on with are not.
        prompt: with {context} and {input}.
    """

    name: str
    language: str
    metric: str
    tokens: int
    chat: bool
    prompt: str

    def ask(self, item: Item) -> str:
        """The prompt for an item."""
        # One pass, so that braces in the data stay what they are.
        return self.prompt.format(context=item.context, input=item.input)

    def score(self, output: str, item: Item) -> float:
        """How good an output is, from 0 to 1, against the answer that it is nearest to."""
        if self.name in FIRST_LINE:
            output = output.lstrip("\n").split("\n")[0]
        return max(METRICS[self.metric](output, answer, item.all_classes) for answer in item.answers)


_TEXTS = json.loads(Path(__file__).with_name("longbench.json").read_text(encoding="utf-8"))
LONG_TASKS = {name: LongTask(name, **fields) for name, fields in _TEXTS.items()}


def long_task(name: str) -> LongTask:
    """The task of a name; "hotpotqa_e" is hotpotqa with the even lengths of LongBench-E.

    Raises:
        LongContextError: there is none.
    """
    task = LONG_TASKS.get(name.removesuffix("_e"))
    if task is None:
        raise LongContextError(f"LongBench has no task {name!r}; it has {', '.join(LONG_TASKS)}")
    return task


class Item(NamedTuple):
    """One question over one long text; `length` in words, or in characters where the text is Chinese."""

    input: str
    context: str
    answers: tuple[str, ...]
    all_classes: tuple[str, ...]
    length: int


def read_items(task: str, source: str | Path | None = None) -> list[Item]:
    """The items of a task.

    Args:
        task: see `long_task`.
        source: a folder with TASK.jsonl in it, or LongBench's data.zip; by default that is fetched from the hub.

    Raises:
        LongContextError: no such task or file, or a line that is no item; the message names file, line and field.
    """
    name = f"{long_task(task).name}{'_e' * task.endswith('_e')}.jsonl"
    if source is None:
        source = huggingface_hub.hf_hub_download(HUB[0], HUB[1], repo_type="dataset")
    return [_item(line, f"{name}, line {number}") for number, line in enumerate(_lines(Path(source), name), 1)]


def _lines(source: Path, name: str) -> Iterator[str]:
    if source.is_dir():
        file = source / name
        if not file.is_file():
            raise LongContextError(f"{source} has no {name}: put LongBench's file there, or leave source out")
        return iter(file.read_text(encoding="utf-8").splitlines())
    if not zipfile.is_zipfile(source):
        raise LongContextError(f"{source} is neither a folder nor a zip archive: give LongBench's data.zip")
    with zipfile.ZipFile(source) as archive:
        members = [member for member in archive.namelist() if Path(member).name == name]
        if not members:
            raise LongContextError(f"{source} holds no {name}: give LongBench's data.zip")
        return iter(archive.read(members[0]).decode("utf-8").splitlines())


def _item(line: str, where: str) -> Item:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise LongContextError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise LongContextError(f"{where}: a JSON object is needed, not {line[:40]!r}")
    answers, classes = (_texts(fields, name, where) for name in ("answers", "all_classes"))
    if not answers:
        raise LongContextError(f"{where}: answers: there is none to compare with")
    wrong = next((name for name in ("input", "context") if not isinstance(fields.get(name), str)), None)
    if wrong is not None:
        raise LongContextError(f"{where}: {wrong}: must be a text, not {fields.get(wrong)!r}")
    if type(fields.get("length")) is not int:
        raise LongContextError(f"{where}: length: must be a whole number, not {fields.get('length')!r}")
    return Item(fields["input"], fields["context"], answers, classes, fields["length"])


def _texts(fields: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    values = fields.get(name) or []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise LongContextError(f"{where}: {name}: must be a list of texts, not {str(values)[:40]!r}")
    return tuple(values)


class Cut(NamedTuple):
    """A text that fits, and how many of its tokens were left out for that."""

    text: str
    lost: int


def cut_middle(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Cut:
    """Leaves out the middle of a text that is too long, as many tokens on either side being kept.

    Args:
        tokenizer: counts.
        text: a prompt.
        length: tokens that it may have.

    Source: Bai et al. 2023 (arXiv 2308.14508), section 4.1.
    """
    ids = plain_ids(text, tokenizer)
    if len(ids) <= length:
        return Cut(text, 0)
    half = length // 2
    parts = ids[:half], ids[len(ids) - half :]
    left, right = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts)
    # A character that the cut went through is no character any more.
    return Cut(left.rstrip("\ufffd") + right.lstrip("\ufffd"), len(ids) - 2 * half)


class Answer(NamedTuple):
    """What a model said to one item, its score from 0 to 1, and how many tokens of the prompt were left out."""

    output: str
    score: float
    lost: int


def run_task(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    items: Sequence[Item],
    template: Template | None = None,
    length: int | None = None,
) -> list[Answer]:
    """A model's answers to items of a task, each token the likeliest one.

    Args:
        model: has `predict`.
        tokenizer: its own.
        task: see `long_task`.
        items: from `read_items`.
        template: a chat model's; None for a base model, which goes on with the prompt as it is.
        length: tokens that a prompt may have, its template included; by default what the context leaves.

    Raises:
        LongContextError: no room for a prompt.
    """
    asked = long_task(task)
    template = template if asked.chat else None
    room = _room(model, tokenizer, asked, template) if length is None else length
    if room < 2:
        raise LongContextError(f"{task}: {room} tokens are left for the prompt: a longer context is needed")
    return [_answer(model, tokenizer, asked, item, template, room) for item in items]


def _room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: LongTask, template: Template | None) -> int:
    around = len(template.encode([("human", "."), ("gpt", None)], tokenizer)) if template else 0
    # The text's ends may be split otherwise within the template: a few tokens more.
    return model.config.context_length - task.tokens - around - 8


def _answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: LongTask,
    item: Item,
    template: Template | None,
    room: int,
) -> Answer:
    cut = cut_middle(tokenizer, task.ask(item), room)
    output = model.predict(
        cut.text,
        tokenizer,
        max_gen_len=task.tokens,
        temperature=0,
        sft=template is not None,
        convo_template=template,
    )
    return Answer(output, task.score(output, item), cut.lost)


def task_score(answers: Sequence[Answer]) -> float:
    """The score of a task as LongBench prints it: the mean, in hundredths.

    Raises:
        LongContextError: there are no answers.
    """
    if not answers:
        raise LongContextError("there are no answers, and so no score")
    return 100 * sum(answer.score for answer in answers) / len(answers)


def scores_by_length(answers: Sequence[Answer], items: Sequence[Item]) -> dict[str, float]:
    """The score for each of LongBench-E's bands of length that has items, see `BANDS`."""
    bands = {name: [a for a, i in zip(answers, items, strict=True) if i.length in band] for name, band in BANDS.items()}
    return {name: task_score(found) for name, found in bands.items() if found}
