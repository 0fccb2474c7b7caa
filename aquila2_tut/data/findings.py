"""What a checker has to say about a file: what is wrong, where, and what to do, in English and in Chinese.

The sentences are in ``findings.json``, by the kind of finding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from aquila2_tut.terminal import printable


class Problem(NamedTuple):
    """Something that is wrong, before it is known where: a kind of ``findings.json``, a field, what to fill in."""

    kind: str
    field: str = ""
    values: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong in a file.

    Attributes:
        file: its name as it was given.
        line: the line in which the sample begins, or in which the fault is where JSON is broken; from 1. None if it
            concerns the whole file.
        index: the place of the sample in a list, from 0; None in .jsonl files.
        field: such as "conversations[2].value"; empty if it concerns the whole sample.
        kind: a key of ``findings.json``.
        values: what the sentences are filled with.
    """

    file: str
    line: int | None
    index: int | None
    field: str
    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def severity(self) -> str:
        """An "error" loses the sample, a "note" does not."""
        return _table()["findings"][self.kind]["severity"]

    @property
    def fatal(self) -> bool:
        """Whether nothing of the file can be read."""
        return _table()["findings"][self.kind].get("fatal", False)

    @property
    def message(self) -> str:
        """What is wrong, in English."""
        return self.say("en")[0]

    @property
    def advice(self) -> str:
        """What to do, in English."""
        return self.say("en")[1]

    def say(self, language: str) -> tuple[str, str]:
        """What is wrong, and what to do.

        Args:
            language: "en" or "zh".
        """
        message, advice = (text.format(**self._words(language)) for text in _table()["findings"][self.kind][language])
        return message, advice

    def line_of_text(self, language: str = "en") -> str:
        """All of it in one line, safe to print."""
        colon, stop, end = ("：", "；", "。") if language == "zh" else (": ", "; ", ".")
        severity = {"error": "错误", "note": "提示"}[self.severity] if language == "zh" else self.severity
        message, advice = self.say(language)
        parts = [self.where(language), severity, *([_name(self.field)] if self.field else []), message]
        return " ".join(printable(colon.join(parts) + stop + advice + end).split())

    def where(self, language: str = "en") -> str:
        """The file, and the line and the sample where these are known."""
        sample = {"en": ", sample {}", "zh": "，样本 {}"}[language].format(self.index) if self.index is not None else ""
        return f"{self.file}{f':{self.line}' if self.line else ''}{sample}"

    def _words(self, language: str) -> dict[str, Any]:
        known = {**_table()["words"].get(language, {}), **_table()["reasons"].get(language, {})}
        return {key: known.get(value, value) for key, value in self.values.items()}


def quoted(value: Any, longest: int = 60) -> str:
    """Text of a file as it may stand in a message: in quotation marks, not too long, nothing invisible in it."""
    text = value if isinstance(value, str) else str(value)
    return repr(text if len(text) <= longest else text[: longest - 1] + "…")


def _name(path: str) -> str:
    """A field's path; a key that a file made up may hold anything."""
    return path if path.isascii() and path.isprintable() and len(path) <= 60 else quoted(path)


@cache
def _table() -> dict[str, Any]:
    return json.loads(resources.files(__package__).joinpath("findings.json").read_text(encoding="utf-8"))
