"""What a model learns from a conversation: its answers and the token that ends each, and nothing else.

`encode_conversation` gives token ids and labels. A label is the token's id where the model is to learn to write it, and
-100, which every loss of torch leaves out, in the system text, the questions and the markers.

Which tokens these are is decided by characters: the tokenizer says which characters each token covers, and a token is
learned if any of them belongs to an answer or to what ends it. The original cut the string at its separators,
tokenized the parts once more and counted; where the counts did not add up, the whole sample lost its labels without a
word. That befell conversations that end with a question, answers that contain the separator, and nearly every English
conversation of "aquila-legacy".

That template is the one with a question to decide. Its marker "### Assistant: " ends in a space, and in the whole
string byte-pair encoding merges that space into the answer's first word. But when a model answers, the prompt ends
there, with the space as a token of its own. So the answer is encoded apart from the marker: the model is trained on the
very tokens it will see and write. The same holds in "chatml" for answers that begin with a line break. In "aquila" and
"aquila-chat" the prompt ends before the space, the answer's first word takes the space with it, and a Chinese answer,
which merges with no space, follows one that is not learned. `aquila2_tut.chat.templates.Template.runs` is where this is
done, for prompts and for training alike, so the prompt of each turn is a beginning of the training ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from aquila2_tut.chat.templates import Segment, Template, TemplateError, Turn, check_plain, check_turns, get_template
from aquila2_tut.data.conversations import without_leading_answer
from aquila2_tut.data.corpora import DataError
from aquila2_tut.terminal import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # torch's cross-entropy leaves this label out
Encoded = dict[str, list[int]]


def encode_conversation(
    sample: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template: str | Template,
    max_length: int | None = None,
) -> Encoded:
    """Token ids and labels of a conversation.

    Args:
        sample: {"conversations": [{"from": "human" | "gpt", "value": text}, ...]}. An answer at the very beginning is
            skipped. A question at the end is kept; nothing is learned from it.
        tokenizer: a fast one, see `aquila2_tut.load_tokenizer`.
        template: a prompt format or its name.
        max_length: tokens after which the conversation is cut off on the right, as in the original.

    Returns:
        {"input_ids": [...], "labels": [...]}, equally long; each label is the token's own id or -100, not shifted.

    Raises:
        DataError: the turns are wrong, there is no answer, or `max_length` cuts off all that is to be learned.
        TemplateError: no such template, or a tokenizer that does not fit it.
    """
    template = get_template(template) if isinstance(template, str) else template
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise DataError(f"max_length is {max_length!r}: it must be an integer of at least 1, or None")
    turns = conversation_turns(sample)
    ids: list[int] = []
    learned: list[bool] = []
    for run_ids, run_learned in _encoded_runs(template, template.segments(turns), tokenizer):
        ids += run_ids
        learned += run_learned
    if max_length is not None and not any(learned[:max_length]):
        raise DataError(
            f"{_named(sample)}max_length={max_length} leaves nothing to learn: the first answer begins after "
            f"{learned.index(True)} tokens; raise max_length, or shorten the question"
        )
    labels = [index if learn else IGNORED for index, learn in zip(ids, learned, strict=True)]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def conversation_turns(sample: Mapping[str, Any]) -> list[Turn]:
    """The turns of a sample as a template takes them.

    Raises:
        DataError: something is wrong with them; the message names the turn.
    """
    turns = sample.get("conversations") if isinstance(sample, Mapping) else None
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f'{_named(sample)}"conversations" must be a list of {{"from": ..., "value": ...}}')
    try:
        kept = check_turns([(turn.get("from"), turn.get("value")) for turn in without_leading_answer(list(turns))])
    except TemplateError as error:
        raise DataError(f"{_named(sample)}{error}") from error
    if not any(role == "gpt" and text is not None for role, text in kept):
        raise DataError(f"{_named(sample)}there is no answer, so nothing can be learned: add a gpt turn")
    for index, (role, text) in enumerate(kept):
        _check_characters(sample, index, role, text)
    return kept


def _check_characters(sample: Mapping[str, Any], index: int, role: str, text: str | None) -> None:
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{_named(sample)}turn {index} ({role}) holds half a character (a lone surrogate) at position "
            f"{error.start}: write the whole character"
        ) from None


def _named(sample: Any) -> str:
    """The beginning of a message: which sample it is about, if that can be said."""
    identifier = sample.get("id") if isinstance(sample, Mapping) else None
    return f"sample {identifier!r:.60}: " if isinstance(identifier, str | int) else ""


def _encoded_runs(
    template: Template, segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[bool]]]:
    """The ids of each group of pieces that is encoded as one, and which of them are learned."""
    control = template.control_ids(tokenizer)
    runs = template.runs(segments)
    texts = ["".join(piece.text for piece in run) for run in runs if not run[0].is_control]
    plain = iter(_with_places(texts, tokenizer, control))
    for run in runs:
        if run[0].is_control:
            yield [control[run[0].text]], [run[0].learned]
        else:
            ids, places = next(plain)
            yield ids, _learned(places, _spans(run))


def _with_places(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, control: Mapping[str, int]
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """The ids of texts in which no control token is meant, and the characters that each id covers."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    encoded = tokenizer(texts, return_offsets_mapping=True, **options)
    check_plain((index for ids in encoded.input_ids for index in ids), tokenizer, control)
    return list(zip(encoded.input_ids, encoded.offset_mapping, strict=True))


def _spans(run: Sequence[Segment]) -> list[tuple[int, int]]:
    """Where the learned pieces of a run are, in characters."""
    spans, at = [], 0
    for piece in run:
        if piece.learned:
            spans.append((at, at + len(piece.text)))
        at += len(piece.text)
    return spans


def _learned(places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """For each token whether it covers a character of a span; both are in the order of the text."""
    found, rest = [], iter(spans)
    begin, end = next(rest, (0, 0))
    for first, last in places:
        while first >= end and end:
            begin, end = next(rest, (0, 0))
        found.append(last > begin and first < end)
    return found


# ---------- what is learned, in figures and to look at ----------


@dataclass(frozen=True)
class MaskReport:
    """How much of a data set is learned.

    Attributes:
        samples: how many there are.
        tokens: in all samples.
        trained_tokens: those with a label.
        without_labels: samples from which nothing is learned.
        longest: tokens of the longest sample.
    """

    samples: int
    tokens: int
    trained_tokens: int
    without_labels: int
    longest: int


def mask_report(dataset: Iterable[Mapping[str, Sequence[int]]]) -> MaskReport:
    """Count what is learned.

    Args:
        dataset: samples with "input_ids" and "labels", as `encode_conversation` gives them.
    """
    samples = tokens = trained = without = longest = 0
    for sample in dataset:
        labels = sum(label != IGNORED for label in sample["labels"])
        samples, tokens, trained = samples + 1, tokens + len(sample["input_ids"]), trained + labels
        without, longest = without + (labels == 0), max(longest, len(sample["input_ids"]))
    return MaskReport(samples, tokens, trained, without, longest)


def mask_pieces(encoded: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The text of a sample in pieces, each with whether it is learned.

    Args:
        encoded: what `encode_conversation` gave.
        tokenizer: the same as there.
    """
    pairs = zip(encoded["input_ids"], encoded["labels"], strict=True)
    groups = [([index for index, _ in group], kind) for kind, group in groupby(pairs, lambda pair: pair[1] != IGNORED)]
    return [(tokenizer.decode(ids, clean_up_tokenization_spaces=False), learned) for ids, learned in groups]


def show_in_terminal(
    encoded: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase, colour: bool = True
) -> str:
    """A sample as text for a terminal: what is learned is bold and green, or without colours stands in « ».

    Args:
        encoded: what `encode_conversation` gave.
        tokenizer: the same as there.
        colour: whether the terminal shows colours.

    Returns:
        Text in which only these colours steer the terminal.
    """
    before, after = ("\x1b[1;32m", "\x1b[0m") if colour else ("«", "»")
    pieces = mask_pieces(encoded, tokenizer)
    return "".join(f"{before}{printable(text)}{after}" if learned else printable(text) for text, learned in pieces)
