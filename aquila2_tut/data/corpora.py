"""Small texts in English and Chinese, out of the assets.

`parallel_sentences` says the same thing twice, `dialogues` does not: each language has conversations of its own.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath

import regex
import yaml

from aquila2_tut import assets

LANGUAGES = {"en": "english", "zh": "chinese"}
_CONTEXT_END = "\x04"  # gettext writes the place of use before the message, with this between


class DataError(ValueError):
    """A text that is not there, or is not what it should be."""


def parallel_sentences() -> list[tuple[str, str]]:
    """What JupyterLab says on its screen: titles, menus, questions, explanations.

    Returns:
        (English, Chinese), each pair once. Messages that were left in English, such as names, are not among them.

    Raises:
        AssetError: the asset "jupyterlab-zh" has not been fetched yet.
    """
    found = {
        (message.rpartition(_CONTEXT_END)[2].strip(), chinese.strip())
        for _, data in _members("jupyterlab-zh", ".json")
        for message, (chinese, *_) in json.loads(data).items()
        if message  # the one without a name is about the file
    }
    return sorted(pair for pair in found if pair[0] and regex.search(r"\p{Han}", pair[1]))


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
    files = [data for name, data in _members("chatterbot-corpus", ".yml") if name.parent.name == LANGUAGES[language]]
    # The base loader leaves every word a string: to the others "yes" is true and "1984" a number.
    return [turns for data in files for turns in yaml.load(data, Loader=yaml.BaseLoader)["conversations"]]


def _members(asset: str, ending: str) -> Iterator[tuple[PurePosixPath, str]]:
    """The path and the text of an archive's files of one kind, in the order of their paths."""
    with zipfile.ZipFile(assets.path(asset)) as box:
        for name in sorted(box.namelist()):
            if name.endswith(ending):
                yield PurePosixPath(name), box.read(name).decode("utf-8")
