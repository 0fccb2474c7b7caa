"""Readers: from an archive, as it was published, to plain text.

Each reader knows one format and nothing of models: the pages of a help system, an R data file, the docstrings of
Python, poems in JSON. What it leaves out of the text is said in its docstring.
"""

from __future__ import annotations

import ast
import io
import json
import lzma
import struct
import sysconfig
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import regex


class DataError(ValueError):
    """A text that is not there, or is not what it should be."""


class Paragraph(NamedTuple):
    """A paragraph of a help page; ``id`` is the same in every language."""

    id: str
    text: str


# --- Debian packages -------------------------------------------------------------------------------------------------

_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60


def deb_files(archive: Path, ending: str) -> Iterator[tuple[str, bytes]]:
    """The files of a Debian package whose path has one ending, in the order of the package.

    Args:
        archive: a .deb, which is an ``ar`` archive of three members; ``data.tar.*`` is the one with the files.
        ending: such as ".html".

    Yields:
        (path without the leading "./", content)

    Raises:
        DataError: the file is no such archive.

    Source: ar(5) and deb(5).
    """
    data = _ar_member(archive, "data.tar")
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|*") as box:
            for entry in box:
                if entry.isfile() and entry.name.endswith(ending):
                    yield entry.name.removeprefix("./"), box.extractfile(entry).read()  # type: ignore[union-attr]
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{archive}: its files cannot be read ({error}); fetch it again") from error


def _ar_member(archive: Path, beginning: str) -> bytes:
    with archive.open("rb") as stream:
        if stream.read(len(_AR_MAGIC)) != _AR_MAGIC:
            raise DataError(f"{archive} is not a Debian package: it does not begin with {_AR_MAGIC!r}; fetch it again")
        while len(header := stream.read(_AR_HEADER)) == _AR_HEADER:
            size = int(header[48:58])
            if header[:16].decode("ascii").startswith(beginning):
                return stream.read(size)
            stream.seek(size + size % 2, io.SEEK_CUR)  # members begin at even offsets
    raise DataError(f"{archive} is not a Debian package: it has no member {beginning}.*; fetch it again")


# --- help pages ------------------------------------------------------------------------------------------------------

_BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "pre"}
_BODY = regex.compile(r'<div id="DisplayArea".*?(?=<div id="SearchFrame"|<footer|\Z)', regex.DOTALL)
_LABELS = {"howtogetheader", "related"}  # "To access this command..." and "Related Topics": on most pages


def help_paragraphs(html: str) -> list[Paragraph]:
    """The paragraphs, headings and listings of one LibreOffice help page.

    Left out: the frame of the page, pictures, the two labels that stand on most pages, and all but one of the
    readings that a sentence has for different systems and programs.

    Args:
        html: the whole page.

    Returns:
        The paragraphs that have words in them, in their order; white space is single blanks, except in listings.
    """
    found = _BODY.search(html)
    parser = _HelpPage()
    parser.feed(found.group() if found else "")
    parser.close()
    return parser.paragraphs


class _HelpPage(HTMLParser):
    """Collects paragraphs; a switch inside a sentence becomes one of its alternatives."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[Paragraph] = []
        self._block: dict[str, str] | None = None
        self._pieces: list[str] = []
        self._spans: list[_Span] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by HTMLParser for each opening tag."""
        if tag in _BLOCKS:
            self._finish()
            self._block = {"tag": tag, **{key: value or "" for key, value in attrs}}
        elif tag == "br":
            self._pieces.append("\n")
        elif tag == "span":
            values = dict(attrs)
            self._spans.append(_Span(values.get("class") or "", values.get("id") or "", len(self._pieces)))

    def handle_data(self, data: str) -> None:
        """Called by HTMLParser for each piece of text."""
        if self._block is not None:
            self._pieces.append(data)

    def handle_endtag(self, tag: str) -> None:
        """Called by HTMLParser for each closing tag."""
        if tag in _BLOCKS:
            self._finish()
        elif tag == "span" and self._spans:
            span = self._spans.pop()
            if self._spans and self._spans[-1].kind == "switchinline" and self._block is not None:
                self._spans[-1].alternatives.append((span, "".join(self._pieces[span.begin :])))
                del self._pieces[span.begin :]
            elif span.alternatives:
                self._pieces[span.begin :] = [span.chosen()]

    def _finish(self) -> None:
        block, text, self._block, self._pieces = self._block, "".join(self._pieces), None, []
        for span in self._spans:
            span.begin = 0
        if block is None or block.get("class") in _LABELS:
            return
        lines = [" ".join(line.split()) for line in text.splitlines()]
        text = text.strip("\n").rstrip() if block["tag"] == "pre" else " ".join(filter(None, lines))
        if regex.search(r"\w", text):
            self.paragraphs.append(Paragraph(block.get("id", ""), text))


class _Span:
    """An open <span>: where its text begins, and what its children offer if it is a switch."""

    def __init__(self, kind: str, name: str, begin: int) -> None:
        self.kind, self.name, self.begin = kind, name, begin
        self.alternatives: list[tuple[_Span, str]] = []

    def chosen(self) -> str:
        """The default reading, or the first where there is no default."""
        default = [text for span, text in self.alternatives if span.name.startswith("default")]
        return (default or [text for _, text in self.alternatives])[0]


# --- R ---------------------------------------------------------------------------------------------------------------

_R_STRINGS, _R_STRING = 16, 9  # SEXP types STRSXP and CHARSXP


def r_string_vectors(database: bytes) -> list[list[str]]:
    """The character vectors in an R lazy-load database (.rdb).

    Args:
        database: blocks one after another: four bytes with the size (big-endian), then a zlib stream.

    Returns:
        One list of strings a block; NA becomes an empty string.

    Raises:
        DataError: a block is not a plain character vector in R's XDR serialisation.

    Source: R Internals, 1.8 Serialization Formats.
    """
    vectors, offset = [], 0
    while offset < len(database):
        (size,) = struct.unpack_from(">I", database, offset)
        stream = zlib.decompressobj()
        block = stream.decompress(database[offset + 4 :])
        if len(block) != size:
            raise DataError(f"R database: the block at byte {offset} has {len(block)} bytes, its head says {size}")
        vectors.append(_r_strings(block))
        offset = len(database) - len(stream.unused_data)
    return vectors


def _r_strings(block: bytes) -> list[str]:
    version, offset = struct.unpack_from(">I", block, 2)[0], 14
    if version >= 3:
        offset += 4 + struct.unpack_from(">I", block, offset)[0]  # the name of the encoding
    kind, count = struct.unpack_from(">II", block, offset)
    if block[:2] != b"X\n" or kind & 0xFF != _R_STRINGS:
        raise DataError("R database: a block is not a character vector in XDR format")
    offset, strings = offset + 8, []
    for _ in range(count):
        kind, length = struct.unpack_from(">Ii", block, offset)
        if kind & 0xFF != _R_STRING:
            raise DataError(f"R database: an element is of type {kind & 0xFF}, not a string")
        end = offset + 8 + max(length, 0)
        strings.append(block[offset + 8 : end].decode("utf-8"))
        offset = end
    return strings


# --- novels ----------------------------------------------------------------------------------------------------------

_CHAPTER = regex.compile(r"\s*chapter\s+(?:[ivxlc]+|\d+)\b\.?\s*", regex.IGNORECASE)
_VOLUME = regex.compile(r"\s*volume\s+(?:[ivxlc]+|\d+)\b\.?\s*", regex.IGNORECASE)
_END = regex.compile(r"\s*(the end|finis|a note on the text)\.?\s*", regex.IGNORECASE)


def chapters(lines: Iterable[str]) -> list[str]:
    """A novel's chapters. Lines of one paragraph become one line; the emphasis marks of plain text (_so_) go.

    Left out: what stands before the first chapter (title, author, year, contents) and after the end.

    Args:
        lines: the novel as it was set, with a blank line between paragraphs.

    Returns:
        One text a chapter, the heading first, a line a paragraph.
    """
    found: list[list[str]] = []
    paragraph: list[str] = []
    for line in [*lines, "The End"]:
        heading = _CHAPTER.fullmatch(line)
        if heading or _END.fullmatch(line) or _VOLUME.fullmatch(line) or not line.strip():
            if paragraph and found:
                found[-1].append(regex.sub(r"_([^_]+)_", r"\1", " ".join(paragraph)))
            paragraph = []
        if heading:
            found.append([line.strip().capitalize()])
        elif _END.fullmatch(line) and found and len(found[-1]) > 1:
            break
        elif line.strip() and not _VOLUME.fullmatch(line):
            paragraph.append(line.strip())
    return ["\n".join(chapter) for chapter in found if len(chapter) > 1]


# --- Python's own words ----------------------------------------------------------------------------------------------

_NOT_READ = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "__pycache__"}


_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(source: str) -> str:
    """The docstrings of a module with the signatures they belong to. The module is read, never run.

    Args:
        source: Python source text.

    Returns:
        The module's docstring, then for each documented public class and function its signature and its docstring, in
        the order of the source.
    """
    tree = ast.parse(source)
    parts = [ast.get_docstring(tree) or ""]
    for node in _definitions(tree):
        text = ast.get_docstring(node)
        if text and not node.name.startswith("_"):
            parts.append(f"{_signature(node)}\n{text.strip()}")
    return "\n\n".join(part.strip() for part in parts if part.strip())


def _definitions(node: ast.AST) -> Iterator[_Definition]:
    # Expressions are most of a tree, and no definition is inside of one.
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Definition):
            yield child
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from _definitions(child)


def _signature(node: _Definition) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    return f"def {node.name}({ast.unparse(node.args)})"


def standard_library() -> Iterator[tuple[str, str]]:
    """The modules of the running Python's standard library, tests and installed packages aside.

    Yields:
        (module name, its docstrings), in the order of the names; modules without any are passed over.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if not _NOT_READ & set(parts) and parts[0] != "pydoc_data":
            text = docstrings(file.read_text(encoding="utf-8", errors="replace"))
            if text:
                yield ".".join(parts).removesuffix(".__init__"), text


def help_topics() -> Iterator[tuple[str, str]]:
    """What ``help("TOPIC")`` says: the chapters of Python's language reference.

    Yields:
        (topic, text), in the order of the topics.
    """
    file = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    if not file.is_file():
        return
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
            yield from sorted((name, text.strip()) for name, text in ast.literal_eval(node.value).items())


# --- poems -----------------------------------------------------------------------------------------------------------

# What a sound poem is written with. Anything else (□ for a lost character, kana and Cyrillic where a conversion of
# encodings went wrong) is damage.
_SOUND = regex.compile(r"[\p{Han}〇，。、；：？！…《》“”‘’（）「」・·\n]+")
_HEAD = regex.compile(r"[\p{Han}〇・·、，/（）]+")
_NAME = regex.compile(r"[\p{Han}〇《》]+")
_PUNCTUATION = str.maketrans("()[]〔〕［］,;:?!．", "（）（）（）（），；：？！。")


def poem(title: str, author: str, paragraphs: Iterable[str]) -> str | None:
    """One poem as text: "title 作者", then a line a sentence.

    Args:
        title: the tune (词牌、曲牌), or the play and the tune.
        author: the poet.
        paragraphs: the sentences.

    Returns:
        The text; None if nothing is left of it or characters are lost.
    """
    tune, _, rest = title.partition("・")
    # In the Yuan collection the words of a long first line were taken for a title.
    words = rest if regex.search(r"[，。？！；：]", rest) else ""
    text = words + "".join(line.strip() for line in paragraphs)
    text = regex.sub(r'"([^"]*)"', r"“\1”", text).translate(_PUNCTUATION)
    text = regex.sub(r"([，。？！；：、）])。+", r"\1", text)
    lines = regex.findall(r"[^。？！]+[。？！]*[”’）」]*", text)
    head = (tune if words else title).translate(_PUNCTUATION).strip()
    name = author.strip().rstrip("0123456789")  # a number tells two poets of one name apart
    if not (lines and _HEAD.fullmatch(head) and _NAME.fullmatch(name) and _SOUND.fullmatch("".join(lines))):
        return None
    return "\n".join([f"{head.replace('・', '·')}　{name}", *lines])


def poems(entries: Iterable[dict[str, Any]]) -> Iterator[tuple[int, str]]:
    """The sound poems of a file.

    Args:
        entries: with "author", "paragraphs", and the tune as "rhythmic" (Song) or "title" (Yuan).

    Yields:
        (index in the file, text)
    """
    for index, entry in enumerate(entries):
        text = poem(entry.get("rhythmic") or entry.get("title", ""), entry["author"], entry["paragraphs"])
        if text:
            yield index, text


def json_members(archive: Path, ending: str = ".json") -> Iterator[tuple[str, Any]]:
    """The JSON files of a zip, in the order of their paths.

    Yields:
        (path, what the file says)
    """
    return ((name, json.loads(data)) for name, data in zip_files(archive, ending))


def zip_files(archive: Path, ending: str) -> Iterator[tuple[str, bytes]]:
    """The files of a zip whose path has one ending, in the order of their paths.

    Yields:
        (path, content)
    """
    with zipfile.ZipFile(archive) as box:
        for name in sorted(name for name in box.namelist() if name.endswith(ending)):
            yield name, box.read(name)
