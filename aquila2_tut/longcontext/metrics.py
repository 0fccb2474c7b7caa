"""LongBench's metrics: how near an answer comes to the one that was wanted, from 0 to 1.

Source: Bai et al. 2023 (arXiv 2308.14508), table 1 and appendix; where the paper leaves something open, it is as the
authors' scorer does it, so that the figures can be compared with published ones.
"""

from __future__ import annotations

import difflib
import functools
import logging
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from aquila2_tut.longcontext.errors import LongContextError

Metric = Callable[[str, str, Sequence[str]], float]


@functools.cache
def _jieba() -> Callable[[str], list[str]]:
    try:
        import jieba
    except ImportError as error:
        raise LongContextError("Chinese answers are split into words by jieba: pip install jieba") from error
    jieba.setLogLevel(logging.WARNING)
    return jieba.lcut


def _plain(text: str) -> str:
    """Lower case, and no punctuation of any script."""
    return "".join(letter for letter in text.lower() if letter not in string.punctuation and not _is_mark(letter))


def _is_mark(letter: str) -> bool:
    return unicodedata.category(letter).startswith("P") or letter in "＄＋＜＝＞＾｀｜～〜〰〾〿"


def english_words(text: str) -> list[str]:
    """The words of an answer: lower case, without ASCII punctuation and articles."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def chinese_words(text: str) -> list[str]:
    """The words of an answer as jieba splits them: lower case, without punctuation.

    Raises:
        LongContextError: jieba is not installed.
    """
    words = ("".join(_plain(word).split()) for word in _jieba()(text))
    return [word for word in words if word]


def f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    """The harmonic mean of precision and recall over words, each counted as often as it stands in both."""
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def _sentences(text: str) -> list[list[str]]:
    # What stands behind a last full stop, if only a space, is a sentence of one empty word: so `rouge` counts it.
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def common_words(one: Sequence[str], other: Sequence[str]) -> set[str]:
    """The words of a longest common subsequence; of several, the one that leaves out late words of `other` first."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one):
        for j, against in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if word == against else max(table[i][j + 1], table[i + 1][j])
    i, j, words = len(one), len(other), set()
    while i and j:
        if one[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            words.add(one[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def rouge_l(found: str, wanted: str) -> float:
    """ROUGE-L of a summary, over different words: what the sentences have in common, each with each, put together.

    The package `rouge`, which LongBench calls, computes it so. It gives up on sentences of about a thousand words
    together, and LongBench then counts 0; here they are compared.

    Source: Lin 2004 (aclanthology W04-1013), section 3.2, with F1 for the F measure.
    """
    answer, truth = _sentences(found), _sentences(wanted)
    words, wanted_words = ({word for sentence in text for word in sentence} for text in (answer, truth))
    if not words or not wanted_words:
        return 0.0
    same = set().union(*(common_words(sentence, other) for sentence in truth for other in answer))
    precision, recall = len(same) / len(words), len(same) / len(wanted_words)
    return 2 * precision * recall / (precision + recall + 1e-8)


def qa_f1(found: str, wanted: str, classes: Sequence[str] = ()) -> float:
    """F1 over English words."""
    return f1(english_words(found), english_words(wanted))


def qa_f1_zh(found: str, wanted: str, classes: Sequence[str] = ()) -> float:
    """F1 over Chinese words."""
    return f1(chinese_words(found), chinese_words(wanted))


def summary(found: str, wanted: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L over English words."""
    return rouge_l(found, wanted)


def summary_zh(found: str, wanted: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L over Chinese words."""
    cut = _jieba()
    return rouge_l(" ".join(cut(found)), " ".join(cut(wanted)))


def classification(found: str, wanted: str, classes: Sequence[str]) -> float:
    """1 / n where n classes are named and the right one is among them; a class within the right one's name is none."""
    named = [name for name in classes if name in found and (name == wanted or name not in wanted)]
    return 1 / len(named) if wanted in named else 0.0


def _share_of_numbers(found: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", found)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def count(found: str, wanted: str, classes: Sequence[str] = ()) -> float:
    """Of the numbers in an answer, the share that is the right one."""
    return _share_of_numbers(found, wanted)


def retrieval(found: str, wanted: str, classes: Sequence[str] = ()) -> float:
    """The same for the number of a paragraph, which the truth names ("Paragraph 7", "段落7").

    Raises:
        LongContextError: it names none.
    """
    number = re.search(r"(?:Paragraph |段落)(\d+)", wanted)
    if number is None:
        raise LongContextError(f"the answer {wanted!r} names no paragraph: 'Paragraph 7' or '段落7' is needed")
    return _share_of_numbers(found, number[1])


def edit_similarity(found: str, wanted: str, classes: Sequence[str] = ()) -> float:
    """How alike the first line of code in an answer and the truth are, in hundredths.

    A line with a backtick, "#" or "//" is no code. Alike: twice the characters in matching blocks, over all.
    """
    lines = found.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if not line or not wanted:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, wanted).ratio()) / 100


METRICS: dict[str, Metric] = {
    "f1": qa_f1,
    "f1_zh": qa_f1_zh,
    "rouge": summary,
    "rouge_zh": summary_zh,
    "classification": classification,
    "count": count,
    "retrieval": retrieval,
    "edit": edit_similarity,
}
