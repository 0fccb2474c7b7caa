"""Conversations to learn from: the file format of the original README, its reader and its checker.

A list in .json, or one object a line in .jsonl:

    {"id": "1", "conversations": [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Hi!"}]}

The checker reads files of any size: it keeps one sample at a time, and 12 bytes for each id that it has seen.

As in the original, an answer at the very beginning is skipped and ``instruction`` is not used. Unlike there, a
conversation that ends with a question keeps the labels of its answers (see `aquila2_tut.data.masking`), and whatever is
skipped is told.

Source: Aquila2's README.md and finetune/finetune.py for the format.
"""

from __future__ import annotations

import json
import re
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

from aquila2_tut.data.corpora import DataError
from aquila2_tut.data.findings import Finding, Problem, quoted
from aquila2_tut.data.jsonfile import Piece, read_pieces

Sample = dict[str, Any]

ROLES = ("human", "gpt")
# What a control token of the templates and vocabularies looks like; spelled out, so that checking needs no tokenizer.
CONTROL = re.compile(r"</s>|<\|[^|<>\s]{1,40}\|>|\[(?:MASK|gMASK|sMASK|CLS|UNK)\]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_FIELDS = {"id", "conversations", "instruction"}
_ONCE = {"instruction", "unused-field"}  # told at their first appearance: they tend to be in every sample
_MOST_NAMES = 1000  # of fields that are told once
_MOST_PROBLEMS = 100  # of one sample that are told
_EXAMPLES = {
    "": '{"id": "1", "conversations": [...]}',
    "id": '"id": "1"',
    "conversations": '"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]',
    "instruction": '"instruction": ""',
    "turn": '{"from": "human", "value": "..."}',
    "from": '"from": "human"',
    "value": '"value": "..."',
}
_UNREAD = object()  # in place of a value where there is none
_MOST_NAMED = 20  # lines that a warning lists


@dataclass
class Checked:
    """One sample of a file, or something about the file.

    Attributes:
        line: where it begins, from 1; None if it concerns the file.
        index: its place in a list, from 0; None in .jsonl files.
        is_sample: whether this is a sample, good or lost.
        findings: what was found, errors and notes.
        sample: the sample, without an answer at its very beginning; None if there is an error.
    """

    line: int | None
    index: int | None
    is_sample: bool
    findings: list[Finding] = field(default_factory=list)
    sample: Sample | None = None


def checked_samples(path: str | Path) -> Iterator[Checked]:
    """Read a file and check it, sample by sample.

    Args:
        path: a .json or .jsonl file.

    Yields:
        Every sample of the file with its findings, and what there is to say about the file itself.
    """
    seen, told, anything = _Seen(), set(), False
    for piece in read_pieces(path):
        value, problems = (_UNREAD, [piece.problem]) if piece.problem else _parse(piece)
        if value is not _UNREAD:
            problems = chain(problems, sample_problems(value), _duplicate(value, piece, seen))
        checked = Checked(piece.line, piece.index, piece.is_sample, _findings(path, piece, problems, told))
        if checked.is_sample and not any(found.severity == "error" for found in checked.findings):
            checked.sample = {**value, "conversations": without_leading_answer(value["conversations"])}
        anything |= piece.is_sample or any(found.severity == "error" for found in checked.findings)
        yield checked
    if not anything:
        yield Checked(None, None, False, [Finding(str(path), None, None, "", "empty")])


def check_file(path: str | Path) -> Iterator[Finding]:
    """What is wrong with a file of conversations, in the order of the file.

    Args:
        path: a .json or .jsonl file.

    Yields:
        Errors and notes. A file that cannot be read at all is an error too, not an exception.
    """
    for checked in checked_samples(path):
        yield from checked.findings


def read_conversations(
    path: str | Path, skip_errors: bool = False, report: Callable[[Finding], None] | None = None
) -> Iterator[Sample]:
    """The samples of a file that can be learned from.

    Args:
        path: a .json or .jsonl file.
        skip_errors: leave out the samples that are wrong. A warning at the end tells how many these are, and where.
        report: is called with every finding, errors and notes.

    Yields:
        {"id", "conversations"} and what else the sample has, without an answer at its very beginning.

    Raises:
        DataError: at the first error, with its place and what to do; with `skip_errors`, only where nothing of the
            file can be read.
    """
    skipped: list[str] = []
    samples = 0
    for checked in checked_samples(path):
        samples += checked.is_sample
        for found in checked.findings:
            if report:
                report(found)
            if found.severity == "error" and (found.fatal or not skip_errors):
                raise DataError(found.line_of_text())
        if checked.sample is not None:
            yield checked.sample
        elif any(found.severity == "error" for found in checked.findings):
            skipped.append(f"{checked.line}" if checked.line else "?")
    if skipped:
        warnings.warn(_skipped_in_words(path, skipped, samples), stacklevel=2)


def _skipped_in_words(path: str | Path, lines: list[str], samples: int) -> str:
    named = ", ".join(lines[:_MOST_NAMED]) + (f" and {len(lines) - _MOST_NAMED} more" * (len(lines) > _MOST_NAMED))
    return (
        f"{path}: {len(lines)} skipped because of errors, samples in the file: {samples}. Skipped are lines {named}; "
        "`aquila2-tut data check FILE` tells what is wrong with each"
    )


def without_leading_answer(turns: list[Any]) -> list[Any]:
    """The turns of a conversation, without an answer that nothing was asked before; the original skips it too."""
    return turns[1:] if turns and isinstance(turns[0], Mapping) and turns[0].get("from") == "gpt" else turns


# ---------- one sample ----------


def _parse(piece: Piece) -> tuple[Any, list[Problem]]:
    """The value that a sample's bytes stand for, and what is wrong with the JSON itself."""
    problems: list[Problem] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and len(problems) < _MOST_PROBLEMS:
            times = Counter(key for key, _ in pairs)
            problems.extend(Problem("duplicate-key", "", {"key": quoted(key)}) for key in times if times[key] > 1)
        return found

    def refuse(value: str) -> float:
        problems.append(Problem("not-a-number", "", {"value": value}))
        return float(value)

    try:
        text = piece.data.decode("utf-8")
        if "\0" in text:
            return _UNREAD, [Problem("nul", "", {"at": text.index("\0") + 1})]
        return json.loads(text, object_pairs_hook=keep, parse_constant=refuse), problems
    except (ValueError, RecursionError) as error:
        return _UNREAD, [_json_problem(error, piece)]


def _json_problem(error: ValueError | RecursionError, piece: Piece) -> Problem:
    if isinstance(error, UnicodeDecodeError):
        return Problem("encoding", "", {"at": error.start + 1, "byte": f"0x{piece.data[error.start]:02X}"})
    if isinstance(error, RecursionError):
        return Problem("too-deep")
    if not isinstance(error, json.JSONDecodeError):
        return Problem("number")
    reason = error.msg.split(": ")[0]  # the parts of a message that may follow hold text of the file
    return Problem("syntax", "", {"reason": reason, "column": error.colno, "below": error.lineno - 1})


def sample_problems(sample: Any) -> Iterator[Problem]:
    """What is wrong with one sample by itself.

    Args:
        sample: whatever JSON gave.
    """
    if not isinstance(sample, dict):
        yield Problem("not-object", "", {"found": _type(sample), "example": _EXAMPLES[""]})
        return
    yield from _id_problems(sample)
    if "conversations" not in sample:
        yield Problem("no-field", "conversations", {"example": _EXAMPLES["conversations"]})
    elif not isinstance(sample["conversations"], list):
        yield _wrong_type("conversations", sample["conversations"], "list")
    else:
        yield from turn_problems(sample["conversations"])
    instruction = sample.get("instruction", "")
    if instruction is not None and not isinstance(instruction, str):
        yield _wrong_type("instruction", instruction, "string")
    elif instruction:
        yield Problem("instruction", "instruction")
    yield from (Problem("unused-field", key) for key in sample if key not in _FIELDS)


def _id_problems(sample: Sample) -> Iterator[Problem]:
    if "id" not in sample:
        yield Problem("no-field", "id", {"example": _EXAMPLES["id"]})
    elif isinstance(sample["id"], bool) or not isinstance(sample["id"], str | int):
        yield _wrong_type("id", sample["id"], "string or integer")
    elif isinstance(sample["id"], str):
        yield from _text_problems("id", sample["id"])


def turn_problems(turns: list[Any]) -> Iterator[Problem]:
    """What is wrong with the turns of a conversation.

    Args:
        turns: the list under "conversations".
    """
    if not turns:
        yield Problem("no-turns", "conversations")
        return
    for index, turn in enumerate(turns):
        yield from _one_turn(f"conversations[{index}]", turn)
    yield from _order_problems([turn.get("from") if isinstance(turn, dict) else None for turn in turns])


def _one_turn(path: str, turn: Any) -> Iterator[Problem]:
    if not isinstance(turn, dict):
        yield Problem("not-object", path, {"found": _type(turn), "example": _EXAMPLES["turn"]})
        return
    for name in ("from", "value"):
        if name not in turn:
            yield Problem("no-field", f"{path}.{name}", {"example": _EXAMPLES[name]})
        elif not isinstance(turn[name], str):
            yield _wrong_type(f"{path}.{name}", turn[name], "string")
        elif name == "from" and turn[name] not in ROLES:
            yield Problem("unknown-role", f"{path}.from", {"role": quoted(turn[name])})
        elif name == "value":
            yield from _text_problems(f"{path}.value", turn[name])
    yield from (Problem("unused-field", f"conversations[].{key}") for key in turn if key not in ("from", "value"))


def _text_problems(path: str, text: str) -> Iterator[Problem]:
    if not text.strip():
        yield Problem("empty-text", path)
    if half := _SURROGATE.search(text):
        yield Problem("surrogate", path, {"code": f"U+{ord(half[0]):04X}", "at": half.start() + 1})
    if "\0" in text:
        yield Problem("null-character", path, {"at": text.index("\0") + 1})
    if written := sorted(set(CONTROL.findall(text))):
        yield Problem("control-token", path, {"tokens": quoted(" ".join(written))})


def _order_problems(roles: list[Any]) -> Iterator[Problem]:
    """Who speaks after whom; turns whose role is not known are not judged."""
    if roles[0] == "gpt":
        yield Problem("leading-gpt", "conversations[0]")
    for index in range(1, len(roles)):
        if roles[index] in ROLES and roles[index] == roles[index - 1]:
            yield Problem("same-role", f"conversations[{index}].from", {"role": roles[index]})
    if not all(role in ROLES for role in roles):
        return
    if "gpt" not in roles[1:]:
        yield Problem("no-answer", "conversations")
    elif roles[-1] == "human":
        yield Problem("trailing-human", f"conversations[{len(roles) - 1}]")


def _wrong_type(path: str, value: Any, expected: str) -> Problem:
    example = _EXAMPLES[path.rpartition(".")[2]]
    return Problem("wrong-type", path, {"found": _type(value), "expected": expected, "example": example})


def _type(value: Any) -> str:
    """The type of a value as JSON calls it."""
    names = {dict: "object", list: "list", str: "string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "number")


# ---------- many samples ----------


def _findings(path: str | Path, piece: Piece, problems: Iterable[Problem], told: set[str]) -> list[Finding]:
    """Problems with their place: what is told once a file only where it is new, and not too many."""
    found: list[Finding] = []
    left_out: Counter[str] = Counter()
    for kind, name, values in problems:
        if kind in _ONCE and not _is_new(name[:100], told):
            continue
        line = piece.line + values.get("below", 0) if piece.line else None
        finding = Finding(str(path), line, piece.index, name, kind, values)
        if len(found) < _MOST_PROBLEMS:
            found.append(finding)
        else:
            left_out[finding.severity] += 1
    if left_out:
        kind = "more-errors" if left_out["error"] else "more-notes"
        found.append(Finding(str(path), piece.line, piece.index, "", kind, {"count": left_out.total()}))
    return found


def _is_new(name: str, told: set[str]) -> bool:
    if name in told or len(told) >= _MOST_NAMES:
        return False
    told.add(name)
    return True


def _duplicate(sample: Any, piece: Piece, seen: _Seen) -> list[Problem]:
    identifier = sample.get("id") if isinstance(sample, dict) else None
    if isinstance(identifier, bool) or not isinstance(identifier, str | int) or identifier == "":
        return []
    first = seen.add(identifier, piece.line)
    return [Problem("duplicate-id", "id", {"id": quoted(identifier), "first": first})] if first else []


class _Seen:
    """Which ids were seen, and in which line: a hash table in two arrays, 12 bytes a place, half or more of it empty.

    A set of strings would need ten times as much. Two of ten million different ids have the same 64 bits with a
    probability of 3 in a million.
    """

    def __init__(self) -> None:
        self._hashes, self._lines, self._count = array("Q", bytes(8 << 10)), array("I", bytes(4 << 10)), 0

    def add(self, identifier: str | int, line: int) -> int | None:
        """Remember an id; return the line in which it was seen before."""
        data = json.dumps(identifier).encode()
        digest = int.from_bytes(blake2b(data, digest_size=8).digest(), "little") or 1  # 0 is an empty place
        at = self._place(digest)
        if self._hashes[at]:
            return self._lines[at]
        self._put(at, digest, line)
        if 2 * self._count > len(self._hashes):
            self._grow()
        return None

    def _place(self, digest: int) -> int:
        """Where a hash is, or where it belongs."""
        last = len(self._hashes) - 1
        at = digest & last
        while self._hashes[at] not in (0, digest):
            at = (at + 1) & last
        return at

    def _put(self, at: int, digest: int, line: int) -> None:
        self._hashes[at], self._lines[at] = digest, line
        self._count += 1

    def _grow(self) -> None:
        hashes, lines = self._hashes, self._lines
        self._hashes, self._lines, self._count = (
            array("Q", bytes(16 * len(hashes))),
            array("I", bytes(8 * len(lines))),
            0,
        )
        for digest, line in zip(hashes, lines, strict=True):
            if digest:
                self._put(self._place(digest), digest, line)
