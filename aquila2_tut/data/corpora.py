"""Texts in English and Chinese: what the small model is trained on, source by source.

`SOURCES` is the list, with licences; `documents` reads one of them. `parallel_sentences` and `dialogues` are the two
small ones that the chapters open: the first says the same thing twice, the second does not.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import regex
import yaml

from aquila2_tut import assets
from aquila2_tut.data import readers
from aquila2_tut.data.readers import DataError

LANGUAGES = {"en": "english", "zh": "chinese"}
_CONTEXT_END = "\x04"  # gettext writes the place of use before the message, with this between


@dataclass(frozen=True)
class Document:
    """One text: a help page, a chapter, a module's docstrings, a poem, a conversation.

    Args:
        source: a key of `SOURCES`.
        id: unique in its source and the same on every machine.
        language: "en" or "zh".
        text: plain text, a line a paragraph.
    """

    source: str
    id: str
    language: str
    text: str


@dataclass(frozen=True)
class Source:
    """Where documents come from, and whom to thank.

    Args:
        language: "en" or "zh".
        family: sources of one family share ids; a page and its translation always are in the same split.
        assets: the names of the assets that it is read from.
        licence: an SPDX name where there is one.
        attribution: who made it.
        what: what it holds, and what was left out, by language of the reader.
        read: yields (id, text).
    """

    language: str
    family: str
    assets: tuple[str, ...]
    licence: str
    attribution: str
    what: dict[str, str]
    read: Callable[[], Iterator[tuple[str, str]]]


def documents(source: str) -> Iterator[Document]:
    """Every document of a source, one by one, duplicates included.

    Args:
        source: a key of `SOURCES`.

    Raises:
        DataError: there is no such source.
        AssetError: an asset has not been fetched yet; the message says how.
    """
    origin = source_named(source)
    for id, text in origin.read():
        yield Document(source, id, origin.language, text.strip())


def source_named(name: str) -> Source:
    """A source by its name.

    Raises:
        DataError: there is no such source; the message lists those there are.
    """
    if name not in SOURCES:
        raise DataError(f"there is no source {name!r}; known: {', '.join(SOURCES)}")
    return SOURCES[name]


def parallel_sentences() -> list[tuple[str, str]]:
    """What JupyterLab says on its screen: titles, menus, questions, explanations.

    Returns:
        (English, Chinese), each pair once. Messages that were left in English, such as names, are not among them.

    Raises:
        AssetError: the asset "jupyterlab-zh" has not been fetched yet.
    """
    return sorted({pair for _, pair in _messages()})


def _messages() -> Iterator[tuple[str, tuple[str, str]]]:
    """(catalogue, (English, Chinese)) for each translated message."""
    for name, catalogue in readers.json_members(assets.path("jupyterlab-zh")):
        for message, (chinese, *_) in catalogue.items():
            english, chinese = message.rpartition(_CONTEXT_END)[2].strip(), chinese.strip()
            # The message without a name is about the file.
            if english and regex.search(r"\p{Han}", chinese):
                yield PurePosixPath(name).stem, (english, chinese)


def dialogues(language: str) -> list[list[str]]:
    """The conversations of the ChatterBot corpus: short, chatty, and written for each language by itself.

    Args:
        language: a key of `LANGUAGES`.

    Returns:
        One list of utterances a conversation.

    Raises:
        DataError: another language.
        AssetError: the asset "chatterbot-corpus" has not been fetched yet.
    """
    if language not in LANGUAGES:
        raise DataError(f"there are no dialogues in {language!r}; known: {', '.join(LANGUAGES)}")
    found = readers.zip_files(assets.path("chatterbot-corpus"), ".yml")
    files = [data.decode("utf-8") for name, data in found if PurePosixPath(name).parent.name == LANGUAGES[language]]
    # The base loader leaves every word a string: to the others "yes" is true and "1984" a number.
    return [turns for data in files for turns in yaml.load(data, Loader=yaml.BaseLoader)["conversations"]]


# --- the readers of SOURCES ------------------------------------------------------------------------------------------

_MESSAGES_A_DOCUMENT = 20
_SENTENCE = {"en": 40, "zh": 15}  # characters from which a repeated paragraph is a sentence, not a heading


def help_pages(language: str) -> dict[str, list[readers.Paragraph]]:
    """The pages of LibreOffice's help.

    Args:
        language: "en" or "zh".

    Returns:
        path, the same in both languages -> paragraphs

    Raises:
        AssetError: the asset has not been fetched yet.
    """
    return _help_in(assets.path(f"libreoffice-help-{language}"))


@functools.lru_cache(maxsize=2)  # reading takes seconds, and documents and pairs both need it
def _help_in(archive: Path) -> dict[str, list[readers.Paragraph]]:
    pages = {name.partition("/text/")[2]: data for name, data in readers.deb_files(archive, ".html")}
    return {
        page.removesuffix(".html"): readers.help_paragraphs(data.decode("utf-8"))
        for page, data in pages.items()
        if page  # the one outside of text/ says that JavaScript is needed
    }


def _libreoffice(language: str) -> Iterator[tuple[str, str]]:
    """Pages without cells of numbers, without what was not translated, and without what an earlier page said."""
    letters = regex.compile(r"\p{Han}" if language == "zh" else r"\p{L}{2}")
    seen: set[str] = set()
    for page, paragraphs in help_pages(language).items():
        lines = [text for _, text in paragraphs if letters.search(text)]
        lines = [line for line, _ in itertools.groupby(lines)]  # an icon and its name say the same
        fresh = [line for line in lines if len(line) < _SENTENCE[language] or line not in seen]
        seen.update(lines)
        if any(len(line) >= _SENTENCE[language] for line in fresh):
            yield page, "\n".join(fresh)


def _austen() -> Iterator[tuple[str, str]]:
    data = dict(readers.deb_files(assets.path("jane-austen"), "/data/Rdata.rdb"))
    for lines in readers.r_string_vectors(next(iter(data.values()), b"")):
        novel = regex.sub(r"\W+", "-", lines[0].strip().lower())
        yield from ((f"{novel}/{number:02}", text) for number, text in enumerate(readers.chapters(lines), 1))


def _python_docs() -> Iterator[tuple[str, str]]:
    yield from readers.standard_library()
    yield from ((f"topics/{topic}", text) for topic, text in readers.help_topics())


def _song_ci() -> Iterator[tuple[str, str]]:
    for name, entries in readers.json_members(assets.path("song-ci")):
        stem = PurePosixPath(name).stem
        if stem.removeprefix(
            "ci.song."
        ).isdigit():  # the other file repeats poems, half of them in traditional characters
            yield from ((f"{stem}/{index:03}", text) for index, text in readers.poems(entries))


def _yuan_qu() -> Iterator[tuple[str, str]]:
    entries = json.loads(assets.path("yuan-qu").read_text(encoding="utf-8"))
    return ((f"{index:05}", text) for index, text in readers.poems(entries))


def jupyterlab_pairs() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The messages of `parallel_sentences` in the order of their catalogues, some twenty together.

    Yields:
        (id of the document that they are in, the pairs)
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for catalogue, pair in _messages():
        groups.setdefault(catalogue, []).append(pair)
    for catalogue, pairs in groups.items():
        for first in range(0, len(pairs), _MESSAGES_A_DOCUMENT):
            yield f"{catalogue}/{first:04}", pairs[first : first + _MESSAGES_A_DOCUMENT]


def _jupyterlab(side: int) -> Iterator[tuple[str, str]]:
    return ((id, "\n".join(pair[side] for pair in pairs)) for id, pairs in jupyterlab_pairs())


def _dialogues(language: str) -> Iterator[tuple[str, str]]:
    for index, turns in enumerate(dialogues(language)):
        yield f"{index:04}", "\n".join(turn.strip() for turn in turns)


_POETRY = ("MIT (collection); the poems are in the public domain", "chinese-poetry by JackeyGao and contributors, MIT.")
_HELP = ("MPL-2.0", "LibreOffice help by The Document Foundation and LibreOffice contributors, MPL-2.0.")
_LAB = ("BSD-3-Clause", "JupyterLab language pack, Copyright Project Jupyter Contributors, BSD-3-Clause.")
_CHAT = ("BSD", "The ChatterBot corpus by Gunther Cox and contributors.")

SOURCES: dict[str, Source] = {
    "libreoffice-en": Source(
        "en",
        "libreoffice",
        ("libreoffice-help-en",),
        *_HELP,
        {
            "en": "help pages of an office suite; a sentence that many pages repeat stays on the first",
            "zh": "办公软件的英文帮助，一页一篇；多页重复的句子只留第一处",
        },
        functools.partial(_libreoffice, "en"),
    ),
    "libreoffice-zh": Source(
        "zh",
        "libreoffice",
        ("libreoffice-help-zh",),
        *_HELP,
        {
            "en": "the same pages in Chinese, as far as they are translated",
            "zh": "同一批帮助页面的中文版，未翻译的段落已去掉",
        },
        functools.partial(_libreoffice, "zh"),
    ),
    "austen": Source(
        "en",
        "austen",
        ("jane-austen",),
        "MIT (package); the novels are in the public domain",
        "Six novels by Jane Austen, from the R package janeaustenr by Julia Silge, MIT.",
        {"en": "six novels, one chapter a document", "zh": "简·奥斯汀的六部小说，一章一篇"},
        _austen,
    ),
    "python-docs": Source(
        "en",
        "python-docs",
        (),
        "PSF-2.0",
        "Docstrings and help topics of the running Python, Copyright Python Software Foundation, PSF-2.0.",
        {
            "en": "docstrings and help topics of the Python that runs: another version has other texts",
            "zh": "当前 Python 自带的文档字符串和帮助主题；Python 版本不同，内容也略有不同",
        },
        _python_docs,
    ),
    "songci": Source(
        "zh",
        "songci",
        ("song-ci",),
        *_POETRY,
        {
            "en": "ci poems of the Song dynasty: 20,035 of 21,050; those with lost or garbled characters are left out",
            "zh": "宋词，共 21,050 首，去掉有缺字、乱码的，余 20,035 首",
        },
        _song_ci,
    ),
    "yuanqu": Source(
        "zh",
        "yuanqu",
        ("yuan-qu",),
        *_POETRY,
        {
            "en": "qu songs of the Yuan dynasty: 10,729 of 11,057; those with lost or garbled characters are left out",
            "zh": "元曲，共 11,057 首，去掉有缺字、乱码的，余 10,729 首",
        },
        _yuan_qu,
    ),
    "jupyterlab-en": Source(
        "en",
        "jupyterlab",
        ("jupyterlab-zh",),
        *_LAB,
        {"en": "messages of JupyterLab", "zh": "JupyterLab 的界面文字（英文）"},
        functools.partial(_jupyterlab, 0),
    ),
    "jupyterlab-zh": Source(
        "zh",
        "jupyterlab",
        ("jupyterlab-zh",),
        *_LAB,
        {"en": "the same messages in Chinese", "zh": "同一批界面文字的中文版"},
        functools.partial(_jupyterlab, 1),
    ),
    "dialogues-en": Source(
        "en",
        "dialogues-en",
        ("chatterbot-corpus",),
        *_CHAT,
        {"en": "short conversations", "zh": "英文短对话"},
        functools.partial(_dialogues, "en"),
    ),
    "dialogues-zh": Source(
        "zh",
        "dialogues-zh",
        ("chatterbot-corpus",),
        *_CHAT,
        {"en": "short conversations in Chinese", "zh": "中文短对话"},
        functools.partial(_dialogues, "zh"),
    ),
}
