"""The README's experiment with reasoning, in small: a chat model, tuned on answers, tuned on chains of thought.

AquilaChat2-34B had 58.3 % of six tasks right; 65.6 % after supervised fine-tuning (SFT), and 69.4 % where the answers
that it was tuned on began with a chain of thought (CoT). Here the chat model is Aquila2-Nano-Chat and the tasks make
themselves: deduction (bAbI 15), induction (bAbI 16) and kinship. Both tuned models see the same questions in the same
order, once each; only what they are to answer differs.

A model is asked in two ways. It writes an answer, after a chain of thought if it was tuned on them; or the answer is
the one, of all that the task has, which it finds likeliest right after the question, as many a benchmark does it. In
the second way nobody can think.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import regex
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from aquila2_tut.data import Instance, encode_conversation, generate, is_correct
from aquila2_tut.evaluate.errors import EvaluateError
from aquila2_tut.evaluate.generated import ask, guesses, held_out
from aquila2_tut.train.loop import Settings, Step, train

TASKS = ("babi15", "babi16", "kinship")
VARIANTS = ("chat", "think", "sft", "cot")  # "think" is the chat model asked to think step by step
THINKING, TUNED = ("think", "cot"), ("sft", "cot")
WAYS = ("generation", "likelihood")
TEMPLATE = "aquila-v1"  # in which Nano-Chat was tuned
_SENTENCE = regex.compile("[^.。]+[.。]")
_POOL = 2000  # training instances that are looked through for all the answers that a task has
_OWN_DICE = 1000  # the chat model has seen the training stories of seed 42; those of a run begin here


@dataclass(frozen=True)
class Plan:
    """What is tuned on and what is asked.

    Args:
        questions: task -> how many training questions.
        asked: questions a task that the models are judged by, the same for all.
        asked_seed: of their dice.
        language: of all of them.
        batch_size: questions a step.
        learning_rate, warmup: see `aquila2_tut.train.loop.Settings`.
        precision: of the products in training.
    """

    questions: dict[str, int] = field(default_factory=lambda: {"babi15": 1800, "babi16": 1100, "kinship": 1000})
    asked: int = 100
    asked_seed: int = 7
    language: str = "en"
    batch_size: int = 8
    learning_rate: float = 7e-4
    warmup: int = 10
    precision: str = "bfloat16"

    def settings(self, seed: int, samples: int) -> Settings:
        """Once through so many samples."""
        how = {"learning_rate": self.learning_rate, "warmup": self.warmup, "precision": self.precision}
        return Settings(steps=samples // self.batch_size, batch_size=self.batch_size, seed=seed, save_every=50, **how)


def training_set(plan: Plan, seed: int) -> list[Instance]:
    """The questions of a run, mixed; on another side of the split than whatever `test_set` gives, whatever the seed."""
    found = [
        instance
        for task, count in plan.questions.items()
        for instance in islice(generate(task, plan.language, "train", _OWN_DICE + seed), count)
    ]
    Random(seed).shuffle(found)
    return found


def test_set(plan: Plan) -> dict[str, list[Instance]]:
    """The questions that every model is asked, by task."""
    return {task: held_out(task, plan.language, plan.asked, plan.asked_seed) for task in plan.questions}


test_set.__test__ = False  # type: ignore[attr-defined]  # no test, though pytest would think so by its name


def possible_answers(task: str, language: str) -> list[str]:
    """All answers that a task has, in the order of the alphabet."""
    return sorted({instance.answer for instance in islice(generate(task, language, "train"), _POOL)})


def guessed(plan: Plan) -> dict[str, list[bool]]:
    """Task -> whether a guess among what each question itself names is right, see `guesses`."""
    found = {}
    for task, asked in test_set(plan).items():
        answers = guesses(islice(generate(task, plan.language, "train"), _POOL), asked, plan.asked_seed)
        found[task] = [is_correct(instance, answer) for instance, answer in zip(asked, answers, strict=True)]
    return found


def tune(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    instances: Sequence[Instance],
    settings: Settings,
    *,
    cot: bool,
    folder: Path | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Tunes a model in place on questions and their answers, or the chains of thought that end in them.

    Args:
        model: an `Aquila2ForCausalLM` in float32.
        tokenizer: its own.
        instances: in the order of one round; the seed of the settings mixes them again.
        settings: see `Plan.settings`.
        cot: whether answers are chains of thought.
        folder, on_step: see `aquila2_tut.train.loop.train`, which goes on where it was stopped.

    Returns:
        The log.
    """
    samples = [encode_conversation(instance.conversation(cot), tokenizer, TEMPLATE) for instance in instances]
    log = train(model, samples, settings, folder, on_step)
    model.eval()
    return log


# --- two ways to ask -------------------------------------------------------------------------------------------------


def written(model: Any, tokenizer: PreTrainedTokenizerBase, instances: Sequence[Instance], *, cot: bool) -> list[str]:
    """What a model writes, always the likeliest token.

    Args:
        model, tokenizer: see `ask`.
        instances: what is asked.
        cot: whether it is asked to think step by step.
    """
    return ask(model, tokenizer, [one.prompt(cot) for one in instances], template=TEMPLATE)


def right(instances: Sequence[Instance], outputs: Sequence[str]) -> list[bool]:
    """Which outputs give the answer."""
    return [is_correct(instance, output) for instance, output in zip(instances, outputs, strict=True)]


def first_wrong_step(instance: Instance, output: str) -> int:
    """The number of the first sentence of a chain of thought that is not the one it should be; 0 where all are.

    There is one plain way to say each step, and one order. Where a step is wrong, the answer may still be right; and
    where none is, a chain may go on when it should end, and come to another answer.

    Args:
        instance: what was asked.
        output: what a model wrote, asked to think step by step.
    """
    wanted, found = (_SENTENCE.findall(text) for text in (instance.reasoning, output))
    return next((n for n, step in enumerate(wanted, 1) if n > len(found) or found[n - 1].strip() != step.strip()), 0)


def likeliest(model: Any, tokenizer: PreTrainedTokenizerBase, instances: Sequence[Instance]) -> list[bool]:
    """Whether, of all answers that its task has, a model finds the right one the likeliest, right after the question.

    Args:
        model, tokenizer: see `ask`.
        instances: what is asked.
    """
    choices = {key: possible_answers(*key) for key in {(one.task, one.language) for one in instances}}
    found = []
    for instance in instances:
        possible = choices[instance.task, instance.language]
        scores = log_likelihoods(model, tokenizer, instance.question, possible)
        found.append(is_correct(instance, possible[int(scores.argmax())]))
    return found


@torch.inference_mode()
def log_likelihoods(
    model: Any, tokenizer: PreTrainedTokenizerBase, question: str, answers: Sequence[str]
) -> torch.Tensor:
    """How likely a chat model finds each answer, as a whole, with the token that ends it.

    The question is read once; its keys and values serve all answers.

    Args:
        model: an `Aquila2ForCausalLM`.
        tokenizer: its own.
        question: the turn of the human.
        answers: N of them.

    Returns:
        (N,) in nats, float64: sums over the tokens of an answer, not means.

    Raises:
        EvaluateError: there are no answers, or the question's tokens depend on what follows it.
    """
    if not answers:
        raise EvaluateError("there is no answer to choose from: give at least one")
    prefix, rests = _split(tokenizer, question, answers)
    read = model(input_ids=torch.tensor([prefix[:-1]]), use_cache=True).past_key_values
    read.batch_repeat_interleave(len(answers))
    width = max(map(len, rests))
    labels = torch.tensor([rest + [-100] * (width - len(rest)) for rest in rests])
    ids = torch.cat([torch.full((len(rests), 1), prefix[-1]), labels[:, :-1].clamp_min(0)], dim=1)
    logits = model(input_ids=ids, past_key_values=read).logits.float()
    return -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").double().sum(1)


def _split(
    tokenizer: PreTrainedTokenizerBase, question: str, answers: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """The tokens before the answers, which are the same for all, and those of each answer."""
    prefixes, rests = set(), []
    for answer in answers:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        encoded = encode_conversation({"conversations": turns}, tokenizer, TEMPLATE)
        first = next(place for place, label in enumerate(encoded["labels"]) if label != -100)
        prefixes.add(tuple(encoded["input_ids"][:first]))
        rests.append(encoded["input_ids"][first:])
    if len(prefixes) > 1:
        raise EvaluateError(f"the tokens of {question!r} depend on the answer after it: end it with a mark")
    return list(prefixes.pop()), rests
