"""A .json list or a .jsonl file, cut into the bytes of its samples, without ever holding the file in memory.

A parser that reads a file as a whole stops at its first error and needs several times its size. Here lines, or in a
list the brackets outside of strings, say where a sample ends; each is then parsed by itself. So a broken sample does
not take its neighbours with it, and the memory needed is that of the longest sample, which has a bound.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aquila2_tut.data.findings import Problem, quoted

MAX_BYTES = 16 * 2**20  # of one sample: a hundred times what a context of 32,768 tokens holds
_CHUNK = 2**20
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
# What stands before the next bracket, whole strings included; between the elements of the list, also before a comma.
_TO_BRACKET = re.compile(rb'(?:[^\[\]{}"]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
_TO_MARK = re.compile(rb'(?:[^\[\]{},"]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)


class Piece(NamedTuple):
    """The bytes of one sample, or what is wrong at this place.

    Attributes:
        line: where the sample begins, from 1; None if it concerns the file.
        index: its place in a list, from 0; None in a file of lines.
        data: its bytes; empty if there is a problem.
        problem: what is wrong.
        is_sample: whether this counts as a sample, read or lost.
    """

    line: int | None
    index: int | None
    data: bytes = b""
    problem: Problem | None = None
    is_sample: bool = True


def read_pieces(path: str | Path) -> Iterator[Piece]:
    """The samples of a file, in order, each as bytes; what the file looks like decides how it is read.

    Args:
        path: a .json or .jsonl file; of others, and where the name is wrong, the first character decides.
    """
    try:
        with open(path, "rb", buffering=_CHUNK) as stream:
            yield from _pieces(stream, Path(path).suffix.lower())
    except FileNotFoundError:
        yield _about_file("missing")
    except IsADirectoryError:
        yield _about_file("directory")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        yield _about_file("unreadable", why=getattr(error, "strerror", None) or str(error))


def _about_file(kind: str, **values: Any) -> Piece:
    return Piece(None, None, problem=Problem(kind, "", values), is_sample=False)


def _about_line(line: int, kind: str, index: int | None = None, is_sample: bool = False, **values: Any) -> Piece:
    return Piece(line, index, problem=Problem(kind, "", values), is_sample=is_sample)


def _pieces(stream: io.BufferedReader, suffix: str) -> Iterator[Piece]:
    if stream.peek().startswith(_UTF16):
        yield _about_file("utf-16")
        return
    if stream.peek().startswith(_BOM):
        stream.read(len(_BOM))
        yield _about_file("bom")
    head = stream.peek().lstrip()
    if suffix == ".json" and head and not head.startswith(b"[") and not _is_line(head):
        yield _about_file("not-list", start=quoted(head[:20].decode("utf-8", "replace")))
    elif _is_list(head, suffix):
        if suffix == ".jsonl":
            yield _about_file("list-in-jsonl")
        yield from ListCutter().cut(stream)
    else:
        if suffix == ".json" and head:
            yield _about_file("lines-in-json")
        yield from _lines(stream)


def _is_list(head: bytes, suffix: str) -> bool:
    """Whether a file holds one list. In a .jsonl file "[" may also begin a line that is wrong by itself."""
    line, _, more = head.partition(b"\n")
    alone = suffix == ".jsonl" and more.strip() and _parses(line)
    return head.startswith(b"[") and not alone


def _is_line(head: bytes) -> bool:
    """Whether the file's first line is an object by itself, as far as it can be seen."""
    line, end, _ = head.partition(b"\n")
    return head.startswith(b"{") and (_parses(line) or (not end and len(head) > _CHUNK // 2))


def _parses(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(stream: io.BufferedReader) -> Iterator[Piece]:
    noted: set[str] = set()
    number = 0
    while line := stream.readline(MAX_BYTES + 1):
        number += 1
        if line.endswith(b"\r\n") and "crlf" not in noted:
            noted.add("crlf")
            yield _about_line(number, "crlf")
        data = line.strip(b" \t\r\n")
        if len(line) > MAX_BYTES and not line.endswith(b"\n"):
            yield _about_line(number, "too-long", None, True, size=len(line) + _skip(stream), limit=MAX_BYTES)
        elif data:
            yield Piece(number, None, data)
        elif "blank-line" not in noted:
            noted.add("blank-line")
            yield _about_line(number, "blank-line")


def _skip(stream: io.BufferedReader) -> int:
    """Read to the end of the line; return how many bytes that was."""
    size = 0
    while part := stream.readline(_CHUNK):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


class ListCutter:
    """Cuts the elements of one JSON list apart.

    It counts how deep the brackets are. An element that closes more than it opened ends with the next comma, so that
    the rest of the list is still read.
    """

    def __init__(self) -> None:
        self._depth = self._index = self._size = 0
        self._line = self._begun = 1  # where we are, and where the current element's bytes began
        self._element = bytearray()

    def cut(self, stream: io.BufferedReader) -> Iterator[Piece]:
        """The elements of the list that a stream begins with."""
        source = self._marks(stream)
        for text, mark in source:
            if self._depth == 0:  # white space, and the bracket that `_is_list` saw
                self._line += text.count(b"\n")
                self._depth = int(mark == b"[")
                continue
            self._take(text)
            if self._depth == 1 and mark in (b",", b"]"):
                yield from self._end(last=mark == b"]")
                if mark == b"]":
                    yield from self._rest(source)
                    return
            else:
                self._take(mark)
                self._depth = max(1, self._depth + (mark in (b"[", b"{")) - (mark in (b"]", b"}")))
        if self._element.strip():
            yield from self._end(last=True)
        yield _about_line(self._line, "unclosed")

    def _marks(self, stream: io.BufferedReader) -> Iterator[tuple[bytes, bytes]]:
        """The bytes before a mark, and the mark: a bracket, or at the top of the list a comma, outside of strings.

        A string may go on in the next chunk. The mark is empty where it does, and at its end.
        """
        inside, held = False, b""
        while chunk := stream.read(_CHUNK):
            chunk, at, held = held + chunk, 0, b""
            while at < len(chunk):
                pattern = _IN_STRING if inside else _TO_MARK if self._depth < 2 else _TO_BRACKET
                end = pattern.match(chunk, at).end()
                if inside and chunk[end : end + 1] == b"\\":  # the last byte: what it escapes is in the next chunk
                    held = b"\\"
                    yield chunk[at:end], b""
                    break
                mark = chunk[end : end + 1]
                inside = mark == b'"' if not inside else not mark
                yield (chunk[at:end], mark) if mark != b'"' else (chunk[at : end + 1], b"")
                at = end + 1
        if held:
            yield held, b""

    def _take(self, text: bytes) -> None:
        self._line += text.count(b"\n")
        self._size += len(text)
        if self._size <= MAX_BYTES:
            self._element += text

    def _end(self, last: bool) -> Iterator[Piece]:
        data, size, line = bytes(self._element).strip(b" \t\r\n"), self._size, self._begun
        line += self._element[: len(self._element) - len(self._element.lstrip(b" \t\r\n"))].count(b"\n")
        self._element.clear()
        self._size, self._begun = 0, self._line
        if size > MAX_BYTES:
            yield _about_line(line, "too-long", self._index, True, size=size, limit=MAX_BYTES)
        elif data:
            yield Piece(line, self._index, data)
        elif self._index or not last:
            yield _about_line(line, "comma", self._index)
            return
        self._index += 1

    def _rest(self, source: Iterator[tuple[bytes, bytes]]) -> Iterator[Piece]:
        """Nothing but white space may follow the list."""
        for text, mark in source:
            start = (text + mark).lstrip(b" \t\r\n")
            self._line += text[: len(text) + len(mark) - len(start)].count(b"\n")
            if start:
                yield _about_line(self._line, "trailing-data", start=quoted(start[:20].decode("utf-8", "replace")))
                return
