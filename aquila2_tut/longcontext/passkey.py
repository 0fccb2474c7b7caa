"""A number hidden in a long text, and asked for at its end: from how far can a model fetch what it has read?

An item is made of real lines, to the token as long as asked, with one needle or several at given depths: "The number of
the garden is 7." A question ends where the answer would begin. It is right if the model would say the answer letter by
letter; a model that is too small for that can still hold it likelier than the other candidates, which is the rank.

Source: the passkey is after Mohtashami and Jaggi 2023 (arXiv 2305.16300), several needles after Hsieh et al. 2024
(arXiv 2404.06654); words and sentences are our own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aquila2_tut.longcontext.errors import LongContextError
from aquila2_tut.model import Aquila2ForCausalLM
from aquila2_tut.model.cache import make_cache

ASK = {"en": "The number of the {key} is", "zh": "{key}的号码是"}
ANSWER = {"en": " {value}", "zh": "{value}"}
END = {"en": ".\n", "zh": "。\n"}
_KEYS = {
    "en": "garden house school church river road king queen doctor captain sister brother horse letter carriage window "
    "table button file page cell line image text street town village bridge island mountain ship tree",
    "zh": "花园 房子 学校 月亮 大江 高楼 将军 公主 先生 书生 妹妹 哥哥 白马 书信 马车 窗口 表格 按钮 文件 页面 "
    "单元格 图像 文字 长街 山城 江村 断桥 小岛 青山 扁舟 梅花 杨柳",
}
KEYS = {language: words.split() for language, words in _KEYS.items()}
CANDIDATES = 10

Lines = Sequence[Sequence[int]]


class Question(NamedTuple):
    """Where the needle lies (0 the beginning, 1 the end), the question's ids, and those of each possible answer.

    The first candidate is the right one.
    """

    depth: float
    asked: list[int]
    candidates: list[list[int]]


@dataclass(frozen=True)
class Item:
    """A text with its needles, and a question about each; text, question and answer together are `length` tokens."""

    language: str
    length: int
    context: list[int]
    questions: list[Question]


class Answer(NamedTuple):
    """How a question was answered: whether word for word, and how many candidates were held likelier."""

    language: str
    length: int
    depth: float
    exact: bool
    rank: int


# --- making items ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Maker:
    """Makes items of one language in one vocabulary.

    Args:
        tokenizer: of the model that will be asked.
        language: "en" or "zh".
        lines: what the needles are hidden among, the ids of each line.
        digits: of a number; with 1 the ten digits are the candidates.

    Raises:
        LongContextError: another language, no lines, or no digits.
    """

    tokenizer: PreTrainedTokenizerBase
    language: str
    lines: Lines
    digits: int = 1

    def __post_init__(self) -> None:
        if self.language not in ASK:
            raise LongContextError(f"there are no needles in {self.language!r}; known: {', '.join(ASK)}")
        if not any(self.lines) or self.digits < 1:
            raise LongContextError("needles need lines to lie among, and numbers of at least one digit")

    def item(self, length: int, depths: Sequence[float], dice: Random, asked: int = 1) -> Item:
        """One item.

        Args:
            length: tokens of text, questions and answers together.
            depths: where the needles lie, from 0 to 1; each has a key and a number of its own.
            dice: choose lines, keys and numbers.
            asked: questions, with the end of a sentence between two, for which room is left.

        Raises:
            LongContextError: the length has no room for the needles.
        """
        facts = self.facts(len(depths), dice)
        needles = [self.encode(self.told(*fact)) for fact in facts]
        questions = [self._question(*fact, depth, dice) for fact, depth in zip(facts, depths, strict=True)]
        tail = max(len(question.asked) + max(map(len, question.candidates)) for question in questions)
        tails = asked * tail + (asked - 1) * len(self.encode(END[self.language]))
        room = length - 1 - tails - sum(map(len, needles))
        if room < 0:
            raise LongContextError(f"{len(needles)} needles and {asked} questions do not fit into {length} tokens")
        body = scatter(self.stretch(room, dice), zip(depths, needles, strict=True))
        return Item(self.language, length, [self.tokenizer.bos_token_id, *body], questions)

    def facts(self, count: int, dice: Random) -> list[tuple[str, str]]:
        """Keys with their numbers; no two keys are the same."""
        if count > len(KEYS[self.language]):
            raise LongContextError(f"there are keys for {len(KEYS[self.language])} needles, not for {count}")
        return [(key, self._number(dice)) for key in dice.sample(KEYS[self.language], count)]

    def _number(self, dice: Random) -> str:
        return "".join(dice.choices("0123456789", k=self.digits))

    def told(self, key: str, value: str) -> str:
        """The needle."""
        return self._ask(key) + ANSWER[self.language].format(value=value) + END[self.language]

    def _ask(self, key: str) -> str:
        return ASK[self.language].format(key=key)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without a control token."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _question(self, key: str, value: str, depth: float, dice: Random) -> Question:
        others = {value}
        while len(others) < CANDIDATES:
            others.add(self._number(dice))
        values = [value, *sorted(others - {value})]
        ask = self._ask(key)
        asked = self.encode(ask)
        whole = [self.encode(ask + ANSWER[self.language].format(value=one)) for one in values]
        if any(ids[: len(asked)] != asked for ids in whole):
            raise LongContextError(f"in this vocabulary the answer melts into the question {ask!r}")
        return Question(depth, asked, [ids[len(asked) :] for ids in whole])

    def stretch(self, tokens: int, dice: Random) -> list[list[int]]:
        """Lines one after the other, from a place of chance, so many tokens together; the beginning is cut to fit."""
        at, found, missing = dice.randrange(len(self.lines)), [], tokens
        while missing > 0:
            found.append(list(self.lines[at % len(self.lines)]))
            at, missing = at + 1, missing - len(found[-1])
        while missing < 0:
            cut = min(-missing, len(found[0]))
            found[0], missing = found[0][cut:], missing + cut
            if not found[0]:
                del found[0]
        return found


def scatter(lines: Sequence[list[int]], needles: Iterable[tuple[float, list[int]]]) -> list[int]:
    """Puts needles between lines, each where the share of the text before it is nearest to its depth."""
    places = [0]
    for line in lines:
        places.append(places[-1] + len(line))
    total, at = max(1, places[-1]), {}
    for depth, needle in needles:
        nearest = min(range(len(places)), key=lambda place: abs(places[place] - depth * total))
        at.setdefault(nearest, []).append(needle)
    pieces = [piece for place in range(len(places)) for piece in (*at.get(place, ()), *lines[place : place + 1])]
    return [id for piece in pieces for id in piece]


def make_items(
    maker: Maker, lengths: Sequence[int], depths: Sequence[float], count: int, seed: int = 0, needles: int = 1
) -> list[Item]:
    """Items for a heat map.

    Args:
        maker: of the language.
        lengths: tokens.
        depths: where what is asked for lies.
        count: items of each length and depth.
        seed: of the dice; the same items for every model.
        needles: in each; beside the one at the given depth others lie anywhere, and it alone is asked about.
    """
    dice, items = Random(f"passkey {maker.language} {seed}"), []
    for length in lengths:
        for depth in depths:
            for _ in range(count):
                item = maker.item(length, [depth, *(dice.random() for _ in range(needles - 1))], dice)
                items.append(Item(item.language, length, item.context, item.questions[:1]))
    return items


# --- asking ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def ask(model: Aquila2ForCausalLM, items: Iterable[Item]) -> list[Answer]:
    """What a model answers to every question of every item; a text is read once for all its questions.

    Args:
        model: of the vocabulary that the items were made in; its positions have to reach as far as they do.
        items: see `make_items`.
    """
    return [answer for item in items for answer in _answers(model, item)]


def _answers(model: Aquila2ForCausalLM, item: Item) -> Iterator[Answer]:
    reader = _Reader(model, item.length)
    reader.scores(item.context)
    for question in item.questions:
        before = reader.scores(question.asked)
        found = [reader.judge(before, candidate) for candidate in question.candidates]
        reader.forget(len(question.asked))
        (right, exact), *others = found
        yield Answer(
            item.language, item.length, question.depth, exact, sum(likelihood >= right for likelihood, _ in others)
        )


class _Reader:
    """A model that goes on reading, and can forget what it read last."""

    def __init__(self, model: Aquila2ForCausalLM, length: int) -> None:
        self.model, self.length, self.cache = model, length, make_cache()

    def scores(self, ids: Sequence[int]) -> Tensor:
        """log-probabilities of the token after these, (V,)."""
        return self._read(ids, 1)[-1]

    def _read(self, ids: Sequence[int], keep: int) -> Tensor:
        # All pieces of a text are turned alike, as long as it will be: dynamic scaling depends on that.
        options = {"past_key_values": self.cache, "use_cache": True, "rotary_length": self.length}
        batch = torch.tensor([list(ids)], device=self.model.device)
        return self.model(input_ids=batch, logits_to_keep=keep, **options).logits[0].float().log_softmax(-1)

    def judge(self, before: Tensor, candidate: Sequence[int]) -> tuple[float, bool]:
        """The log-likelihood of a candidate, and whether each of its tokens is the likeliest one."""
        rows = before[None]
        if len(candidate) > 1:
            rows = torch.cat((rows, self._read(candidate[:-1], len(candidate) - 1)))
            self.forget(len(candidate) - 1)
        ids = torch.tensor(candidate, device=rows.device)
        return float(rows.gather(1, ids[:, None]).sum()), bool((rows.argmax(-1) == ids).all())

    def forget(self, tokens: int) -> None:
        """Takes the last tokens out of the cache."""
        if tokens:
            self.cache.crop(-tokens)


def accuracy(answers: Iterable[Answer], by: str = "exact") -> dict[tuple[int, float], float]:
    """The share of right answers for each length and depth.

    Args:
        answers: of one model.
        by: "exact", or "rank" where the likeliest candidate counts.

    Returns:
        (length, depth) -> 0 to 1, ordered; the cells of a heat map.
    """
    cells: dict[tuple[int, float], list[bool]] = {}
    for answer in answers:
        right = answer.exact if by == "exact" else answer.rank == 0
        cells.setdefault((answer.length, answer.depth), []).append(right)
    return {cell: sum(found) / len(found) for cell, found in sorted(cells.items())}
