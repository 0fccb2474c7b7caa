"""What a model is taught with: long documents to read on in, and texts in which it has to find numbers.

Some rows are documents of the training split, packed as in pretraining. In the others only the answers are labelled:
each text hides a few numbers (`aquila2_tut.longcontext.passkey`) and asks for all of them at its end, and texts of
several lengths share a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from random import Random

from transformers import PreTrainedTokenizerFast

from aquila2_tut.data import Row, corpus, pack_best_fit, pack_stream
from aquila2_tut.data.masking import IGNORED
from aquila2_tut.longcontext.errors import LongContextError
from aquila2_tut.longcontext.passkey import END, Lines, Maker
from aquila2_tut.tokenizer import encode_batch

SOURCES = {"en": ("austen", "python-docs", "libreoffice-en"), "zh": ("libreoffice-zh", "songci")}
POEMS = 60  # one after the other, make a document
_SHORTEST = 64  # tokens of a text with a number in it
_NEEDLES = 6  # in a text, at most


def long_texts(split: str, language: str) -> Iterator[str]:
    """Documents that are worth reading far: chapters, manuals, help pages, and poems in sequence.

    Args:
        split: "train" or "held-out".
        language: "en" or "zh".

    Raises:
        AssetError: a source has not been fetched.
    """
    for source in SOURCES[language]:
        texts = (document.text for document in corpus(split, [source]))
        yield from _in_sequence(texts) if source == "songci" else texts


def _in_sequence(poems: Iterator[str]) -> Iterator[str]:
    while some := list(islice(poems, POEMS)):
        yield "\n\n".join(some)


def lines(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Lines:
    """The lines of texts, each with its end, as ids: what needles are hidden among."""
    found = [f"{line}\n" for text in texts for line in text.splitlines() if line.strip()]
    return encode_batch(tokenizer, found)


def reading_rows(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], length: int, count: int, dice: Random
) -> list[Row]:
    """Rows of documents that fill one alone, in an order of chance; what is left of one begins the next row.

    Args:
        tokenizer: of the model.
        texts: those that have fewer than `length` tokens are left out.
        length: tokens a row.
        count: rows.
        dice: the order.

    Raises:
        LongContextError: the texts do not fill so many rows.
    """
    ids = [row for row in encode_batch(tokenizer, list(texts)) if len(row) >= length - 2]
    dice.shuffle(ids)
    whole = ([tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in ids)
    rows = list(islice(pack_stream(whole, length), count))
    if len(rows) < count or len(rows[-1].input_ids) < length:
        raise LongContextError(f"{len(ids)} texts of {length} tokens do not fill {count} rows: take fewer or shorter")
    return rows


def finding_rows(makers: Sequence[Maker], length: int, count: int, dice: Random) -> list[Row]:
    """Rows of texts with numbers to find, each with its share of short and long ones.

    Args:
        makers: one a language.
        length: tokens of a row, and of the longest texts.
        count: rows.
        dice: everything.
    """
    rows: list[Row] = []
    while len(rows) < count:
        lengths = [length, *(size for size in _halves(length) for _ in range(length // size))]
        rows += pack_best_fit([_lesson(dice.choice(makers), size, dice) for size in lengths], length)
    dice.shuffle(rows)
    return rows[:count]


def _halves(length: int) -> Iterator[int]:
    """length / 2, length / 4, ... down to the shortest text."""
    while (length := length // 2) >= _SHORTEST:
        yield length


def _lesson(maker: Maker, length: int, dice: Random) -> dict[str, list[int]]:
    """A text of at most `length` tokens with its questions and answers, of which the answers alone are labelled."""
    needles, end = dice.randint(1, min(_NEEDLES, length // _SHORTEST)), maker.encode(END[maker.language])
    item = maker.item(length - len(end), [dice.random() for _ in range(needles)], dice, needles)
    ids, labels = list(item.context), [IGNORED] * len(item.context)
    for question in dice.sample(item.questions, needles):
        answer = question.candidates[0]
        ids += [*question.asked, *answer, *end]
        labels += [*[IGNORED] * len(question.asked), *answer, *[IGNORED] * len(end)]
    return {"input_ids": ids, "labels": labels}
