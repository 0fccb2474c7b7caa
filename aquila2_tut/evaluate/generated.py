"""How often a chat model is right on generated tasks, how near its translations come, and what simple answers reach.

A share of right answers says little alone. Beside it belongs what is reached without understanding: the answer that is
most frequent, a guess among the names in the story, the translation of the most similar sentence in the training data.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from random import Random
from typing import Any, NamedTuple, NoReturn

import numpy as np
import regex
from transformers import PreTrainedTokenizerBase

from aquila2_tut.data import TASKS, Instance, generate, is_correct
from aquila2_tut.evaluate.errors import EvaluateError
from aquila2_tut.evaluate.intervals import Estimate, bootstrap, wilson

REASONING = ("babi15", "babi16", "kinship", "arithmetic")


def held_out(task: str, language: str, count: int, seed: int = 0) -> list[Instance]:
    """Instances that no training has seen, see `aquila2_tut.data.generate`."""
    return list(islice(generate(task, language, "test", seed), count))


def ask(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    batch_size: int = 32,
    max_gen_len: int = 160,
    template: str | None = None,
) -> list[str]:
    """A chat model's answers, each token the likeliest one.

    Questions of like length are answered together, as the shorter ones are filled up on the left.

    Args:
        model: has `predict_batch`.
        tokenizer: its own.
        questions: one turn of a conversation each.
        batch_size: questions at once.
        max_gen_len: the most tokens of an answer.
        template: the prompt format, instead of the model's own.
    """
    order = sorted(range(len(questions)), key=lambda index: len(questions[index]))
    found = [""] * len(questions)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        asked = [questions[index] for index in chosen]
        answers = model.predict_batch(asked, tokenizer, max_gen_len=max_gen_len, temperature=0, convo_template=template)
        for index, answer in zip(chosen, answers, strict=True):
            found[index] = answer
    return found


def accuracy(instances: Sequence[Instance], outputs: Sequence[str]) -> Estimate:
    """The share of right answers.

    Raises:
        EvaluateError: there are none, or not one output for each instance.
    """
    _check_as_many(outputs, instances)
    return wilson(sum(map(is_correct, instances, outputs)), len(instances))


def _check_as_many(outputs: Sequence[str], wanted: Sequence[Any]) -> None:
    if len(outputs) != len(wanted):
        raise EvaluateError(f"there are {len(outputs)} outputs for {len(wanted)} questions: one for each is needed")


# --- answers without understanding -----------------------------------------------------------------------------------


def majority(training: Iterable[Instance], count: int) -> list[str]:
    """The answer that is most frequent in training, `count` times.

    Raises:
        EvaluateError: there is no training instance.
    """
    ((answer, _),) = Counter(instance.answer for instance in training).most_common(1) or _no_training()
    return [answer] * count


def _no_training() -> NoReturn:
    raise EvaluateError("there is no training instance to take an answer from")


def guesses(training: Iterable[Instance], instances: Sequence[Instance], seed: int = 0) -> list[str]:
    """For each instance one of the possible answers that its own text names; of all of them where it names none.

    Args:
        training: instances of the same task and language; their answers are the possible ones.
        instances: to be answered.
        seed: of the dice.

    Raises:
        EvaluateError: there is no training instance.
    """
    possible, dice = sorted({instance.answer for instance in training}) or _no_training(), Random(seed)
    return [dice.choice(_named(instance, possible) or possible) for instance in instances]


def _named(instance: Instance, possible: Sequence[str]) -> list[str]:
    """The answers that stand in a question as whole words; of 熊猫 and 猫 in "熊猫" only the longer one."""
    words = "|".join(map(regex.escape, sorted(possible, key=len, reverse=True)))
    edges = r"\b(?:{})\b" if instance.language == "en" else r"(?<!\d)(?:{})(?!\d)"
    said = {word.casefold() for word in regex.findall(edges.format(words), instance.question, flags=regex.IGNORECASE)}
    return [answer for answer in possible if answer.casefold() in said]


# --- translation -----------------------------------------------------------------------------------------------------


class Translation(NamedTuple):
    """A sentence, the question that asks for its translation, and the translation."""

    source: str
    question: str
    reference: str


def translations(
    pairs: Iterable[Sequence[str]], task: str, language: str, count: int | None = None, seed: int = 0
) -> list[Translation]:
    """Sentences to translate, in an order of chance.

    Args:
        pairs: (English, Chinese), of the held-out side; long ones are left out, as in training.
        task: "translate-en-zh" or "translate-zh-en".
        language: of the question.
        count: how many at most.
        seed: of the order.
    """
    dice, made = Random(seed), TASKS[task]
    return [
        Translation(passage.given, told.question, told.answer)
        for passage in islice(made.worlds(dice, pairs), count)
        for told in [made.tell(passage, language, dice)]
    ]


def chrf(outputs: Sequence[str], references: Sequence[str], seed: int = 0, rounds: int = 500) -> Estimate:
    """chrF of translations, 0 to 100: character n-grams in common with the references.

    Args:
        outputs: the translations.
        references: what they should have been.
        seed, rounds: of the interval, see `bootstrap`.

    Raises:
        EvaluateError: not as many of the one as of the other, none, or sacrebleu is not installed.

    Source: Popović 2015 (doi 10.18653/v1/W15-3049), as sacrebleu computes it.
    """
    _check_as_many(outputs, references)
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise EvaluateError("translations are scored with sacrebleu: pip install 'aquila2-tut[eval]'") from error
    metric = CHRF()

    def score(drawn: np.ndarray) -> float:
        return metric.corpus_score([outputs[i] for i in drawn], [[references[i] for i in drawn]]).score

    return bootstrap(score, len(outputs), seed=seed, rounds=rounds)


class NearestPair:
    """Translates a sentence as its most similar sentence in the training data was: no model, but a good memory.

    Similar are sentences with many character n-grams in common, rare ones above all: the cosine of their tf-idf
    vectors.

    Args:
        pairs: (source, target) of the training side.
        longest: characters that an n-gram has at most.

    Raises:
        EvaluateError: there are no pairs.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], longest: int = 4) -> None:
        if not pairs:
            raise EvaluateError("there are no pairs to find a similar sentence among")
        self._targets, self._longest = [target for _, target in pairs], longest
        vectors = [self._grams(source) for source, _ in pairs]
        holders = Counter(gram for vector in vectors for gram in vector)
        self._rarity = {gram: 1 + math.log((1 + len(pairs)) / (1 + held)) for gram, held in holders.items()}
        postings: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
        for number, vector in enumerate(vectors):
            for gram, weight in self._weighted(vector).items():
                postings[gram][0].append(number)
                postings[gram][1].append(weight)
        self._postings = {gram: (np.array(rows), np.array(weights)) for gram, (rows, weights) in postings.items()}

    def _grams(self, text: str) -> Counter[str]:
        text = f" {text.casefold()} "
        sizes = range(1, self._longest + 1)
        return Counter(text[i : i + size] for size in sizes for i in range(len(text) - size + 1))

    def _weighted(self, grams: Counter[str]) -> dict[str, float]:
        """tf-idf of the known n-grams, of length 1 together."""
        weights = {gram: count * self._rarity[gram] for gram, count in grams.items() if gram in self._rarity}
        length = math.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
        return {gram: weight / length for gram, weight in weights.items()}

    def translate(self, source: str) -> str:
        """The target of the pair with the most similar source; of equally similar ones the first."""
        scores = np.zeros(len(self._targets))
        for gram, weight in self._weighted(self._grams(source)).items():
            rows, weights = self._postings[gram]
            scores[rows] += weight * weights
        return self._targets[int(scores.argmax())]
