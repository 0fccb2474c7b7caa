#!/usr/bin/env python3
"""Do the English and the Chinese book say the same? Compares what can be compared without reading prose.

    python book/parity.py           # prints the first difference of each chapter; exit status 1 if there is one

Code cells must be the same to the last byte. Headings, displayed formulas, figures, exercises, code blocks and labels
must be the same and in the same order. Formulas inside a sentence and references must be the same within each stretch
of prose (what stands between two code cells), in any order: a sentence is written anew in each language. Besides, each
code cell must follow a cell of prose, must have been run, and must show no warning, and each figure must say what it
shows.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

BOOK = Path(__file__).resolve().parent
LANGUAGES = ("en", "zh")
SUFFIXES = (".ipynb", ".md")

_FENCE = re.compile(r"^(?P<mark>`{3,}|~{3,}|:{3,}) *(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=mark) *$", re.M | re.S)
_DIRECTIVE = re.compile(r"\{([\w:-]+)\} *(.*)")
_HEADING = re.compile(r"^(#{1,6}) +\S.*$", re.MULTILINE)
_DISPLAY = re.compile(r"\$\$(.+?)\$\$ *(\([\w:.-]+\))?", re.DOTALL)
_INLINE = re.compile(r"(?<![\\$])\$(?=\S)([^$\n]+?(?:\n[^$\n]+?)?)(?<=\S)\$(?![\d$])")
_LABEL = re.compile(r"^\(([\w:.-]+)\)=", re.MULTILINE)
_ROLE = re.compile(r"\{(ref|numref|eq|doc|term|download|exercise|cite(?::\w+)?)\}`(?:[^`<]*<([^`>]+)>|([^`]+))`")
_LINK = re.compile(r"\]\((#[\w:.-]+|[\w./-]+\.(?:md|ipynb)(?:#[\w:.-]+)?)\)")
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)[^)]*\)")
_OPTION = re.compile(r"^:([\w-]+): *(.*)$", re.MULTILINE)
_CODE_SPAN = re.compile(r"(`+)[^`].*?\1", re.DOTALL)
_TEXT_IN_MATH = re.compile(r"\\(text|mbox)\{[^{}]*\}")
_COMMENT = re.compile(r"(^|\s)#.*$", re.MULTILINE)
_TARGETED = ("figure", "image", "solution", "solution-start", "include", "literalinclude", "button-ref")
_BAD_OUTPUT = re.compile(r"Traceback \(most recent call last\)|\b\w*Warning\b:|\bWARNING\b")


@dataclass(frozen=True)
class Mark:
    """One thing of a page that both languages must have."""

    kind: str
    value: str
    cell: int  # counted from 1, as people do; a Markdown page is one cell
    text: str = field(compare=False)


@dataclass
class Stretch:
    """The prose between two code cells: what must stand in order, and what only must be there."""

    first_cell: int
    ordered: list[Mark] = field(default_factory=list)
    loose: dict[tuple[str, str], Mark] = field(default_factory=dict)


def _squeeze(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _formula(text: str) -> str:
    """Return a formula without what may be translated in it, and with its spaces made even."""
    return re.sub(r"\s+", "", _TEXT_IN_MATH.sub(r"\\\1{}", text))


def _block_marks(info: str, body: str) -> Iterator[tuple[str, str]]:
    """Yield what a fenced block asks the other language to have."""
    options = dict(_OPTION.findall(body))
    if match := _DIRECTIVE.match(info.strip()):
        name, argument = match.groups()
        target = argument if name in _TARGETED else ""
        yield f"{{{name}}}", f"{target} {options.get('label') or options.get('name') or ''}".strip()
        if name in ("figure", "image") and not options.get("alt", "").strip():
            yield "figure without :alt:", argument
    elif info.strip() not in ("", "text", "console"):
        yield f"code block ({info.strip()})", _squeeze(_COMMENT.sub("", body))


def _scan_blocks(text: str, cell: int, stretch: Stretch) -> str:
    """Take the fenced blocks out of a text, note them, and return the text with the prose inside directives left in."""
    while match := _FENCE.search(text):
        info, body = match["info"], match["body"]
        for kind, value in _block_marks(info, body):
            stretch.ordered.append(Mark(kind, value, cell, _squeeze(match[0])[:160]))
        prose = _DIRECTIVE.match(info.strip())
        math = prose and prose[1] == "math"
        kept = f"$${_OPTION.sub('', body)}$$" if math else (_OPTION.sub("", body) if prose else "")
        text = text[: match.start()] + kept + text[match.end() :]
    return text


def _scan_prose(text: str, cell: int, stretch: Stretch) -> None:
    """Note the headings, formulas, labels, figures and references of a text without fenced blocks."""
    bare = _CODE_SPAN.sub(lambda m: m[0] if text[max(0, m.start() - 1)] == "}" else " ", text)
    found: list[tuple[int, Mark]] = []
    for match in _HEADING.finditer(bare):
        found.append((match.start(), Mark("heading of level", str(len(match[1])), cell, match[0])))
    for match in _DISPLAY.finditer(bare):
        found.append((match.start(), Mark("formula", _formula(match[1]) + (match[2] or ""), cell, _squeeze(match[0]))))
    for match in _LABEL.finditer(bare):
        found.append((match.start(), Mark("label", match[1], cell, match[0])))
    for match in _IMAGE.finditer(bare):
        found.append((match.start(), Mark("image" if match[1] else "image without alt text", match[2], cell, match[0])))
    stretch.ordered += [mark for _, mark in sorted(found, key=lambda pair: pair[0])]
    _scan_loose(_DISPLAY.sub(" ", bare), cell, stretch)


def _scan_loose(text: str, cell: int, stretch: Stretch) -> None:
    """Note what may stand in another order in the other language."""
    for match in _ROLE.finditer(text):
        if match[1] != "term":  # a term is named in the page's own language
            mark = Mark(f"{{{match[1]}}} to", (match[2] or match[3]).strip(), cell, match[0])
            stretch.loose[mark.kind, mark.value] = mark
    for match in _LINK.finditer(text):
        stretch.loose["link to", match[1]] = Mark("link to", match[1], cell, match[0])
    for match in _INLINE.finditer(_ROLE.sub(" ", text)):
        mark = Mark("formula", _formula(match[1]), cell, match[0])
        stretch.loose[mark.kind, mark.value] = mark


def read_cells(path: Path) -> list[dict[str, Any]]:
    """Return the cells of a notebook, or a Markdown page as one cell of prose."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return json.loads(text)["cells"]
    return [{"cell_type": "markdown", "source": re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)}]


def source_of(cell: dict[str, Any]) -> str:
    """Return a cell's text, however the file stores it."""
    return "".join(cell["source"])


def stretches(cells: list[dict[str, Any]]) -> list[Stretch]:
    """Return the stretches of prose: before the first code cell, between code cells, after the last."""
    parts = [Stretch(1)]
    for number, cell in enumerate(cells, start=1):
        if cell["cell_type"] == "code":
            parts.append(Stretch(number + 1))
        else:
            _scan_prose(_scan_blocks(source_of(cell), number, parts[-1]), number, parts[-1])
    return parts


def _said(mark: Mark | None) -> str:
    return f"cell {mark.cell}: {mark.text or mark.kind}" if mark else "nothing"


def compare_prose(ours: Stretch, theirs: Stretch) -> str | None:
    """Return the first difference between two stretches, or None."""
    for mark in ours.ordered + theirs.ordered:
        if "without" in mark.kind:
            return f"a {mark.kind}: {mark.value}\n  {_said(mark)}"
    for mine, other in zip_longest(ours.ordered, theirs.ordered):
        if mine is None or other is None or (mine.kind, mine.value) != (other.kind, other.value):
            return f"a {(mine or other).kind} differs\n  en {_said(mine)}\n  zh {_said(other)}"
    for key in sorted(set(ours.loose) ^ set(theirs.loose)):
        mine, other = ours.loose.get(key), theirs.loose.get(key)
        return f"{key[0]} {key[1]} stands in one language only\n  en {_said(mine)}\n  zh {_said(other)}"
    return None


def _first_line(ours: str, theirs: str) -> str:
    """Return the first line in which two sources differ."""
    for number, (mine, other) in enumerate(zip_longest(ours.split("\n"), theirs.split("\n")), start=1):
        if mine != other:
            return f"line {number}\n  en {mine!r}\n  zh {other!r}"
    return "the line ends"


def _code(cells: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    return [(number, cell) for number, cell in enumerate(cells, start=1) if cell["cell_type"] == "code"]


def compare_code(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str | None:
    """Return the first difference between the code cells of two notebooks, or None."""
    for mine, other in zip_longest(_code(ours), _code(theirs)):
        if mine is None or other is None:
            number, cell = mine or other
            return f"code cell {number} stands only in {'en' if mine else 'zh'}: {source_of(cell)[:120]!r}"
        if source_of(mine[1]) != source_of(other[1]):
            where = _first_line(source_of(mine[1]), source_of(other[1]))
            return f"the code of cell {mine[0]} (en) and cell {other[0]} (zh) differs in {where}"
        texts = [json.dumps(c[1].get("metadata", {}), ensure_ascii=False, sort_keys=True) for c in (mine, other)]
        if texts[0] != texts[1]:
            return f"the metadata of cell {mine[0]} (en) and {other[0]} (zh) differs\n  en {texts[0]}\n  zh {texts[1]}"
    return None


def _output_problem(output: dict[str, Any]) -> str | None:
    """Return what is wrong with a stored output, or None."""
    if output["output_type"] == "error":
        return f"it ended with {output.get('ename')}: {output.get('evalue')}"
    data = output.get("data", {})
    words = "".join(output.get("text", "")) + "".join(data.get("text/plain", ""))
    if output.get("name") == "stderr" or (bad := _BAD_OUTPUT.search(words)):
        return f"its output shows a warning or an error: {_squeeze(words)[:120] or bad}"
    if "image/svg+xml" in data and "<dc:description>" not in "".join(data["image/svg+xml"]):
        return "its figure does not say what it shows: give `show` an alt text"
    if not {"image/png", "image/jpeg"}.isdisjoint(data):
        return "its figure is a bitmap: the book's figures are SVG, drawn by aquila2_tut.show"
    return None


def check_notebook(cells: list[dict[str, Any]]) -> str | None:
    """Return the first thing wrong with one notebook by itself, or None."""
    before = None
    for number, cell in enumerate(cells, start=1):
        if cell["cell_type"] == "code":
            if before != "markdown":
                return f"code cell {number} does not follow a cell of prose: {source_of(cell)[:80]!r}"
            if cell.get("execution_count") is None and source_of(cell).strip():
                return f"code cell {number} has not been run: {source_of(cell)[:80]!r}"
            if problem := next(filter(None, map(_output_problem, cell.get("outputs", []))), None):
                return f"code cell {number}: {problem}"
        before = cell["cell_type"]
    return None


def compare_page(english: Path, chinese: Path) -> str | None:
    """Return the first difference between the two versions of a chapter, or None."""
    ours, theirs = read_cells(english), read_cells(chinese)
    for language, cells in zip(LANGUAGES, (ours, theirs), strict=True):
        if problem := check_notebook(cells):
            return f"{language}: {problem}"
    if problem := compare_code(ours, theirs):
        return problem
    return next(filter(None, map(compare_prose, stretches(ours), stretches(theirs))), None)


def chapters(folder: Path) -> set[str]:
    """Return the names of the pages in a folder."""
    return {p.name for p in folder.iterdir() if p.suffix in SUFFIXES} if folder.is_dir() else set()


def problems(book: Path = BOOK) -> list[str]:
    """Return the first problem of each chapter, in order; an empty list when the languages agree."""
    english, chinese = (chapters(book / language) for language in LANGUAGES)
    found = [f"{name}: stands only in {'en' if name in english else 'zh'}" for name in sorted(english ^ chinese)]
    for name in sorted(english & chinese):
        if problem := compare_page(book / "en" / name, book / "zh" / name):
            found.append(f"{name}: {problem}")
    return found


def main() -> int:
    """Run from the command line. Returns the exit status."""
    found = problems()
    for problem in found:
        print(problem, file=sys.stderr)
    if not found:
        print(f"{len(chapters(BOOK / 'en'))} chapters say the same in both languages")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
