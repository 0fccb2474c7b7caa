"""What the corpora are: `aquila2-tut data stats` prints how much there is of each source, and whom to thank."""

from __future__ import annotations

import argparse
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from aquila2_tut import assets
from aquila2_tut.data.corpora import SOURCES, documents, source_named
from aquila2_tut.data.splits import SPLITS, duplicates, split_of
from aquila2_tut.terminal import add_common

COLUMNS = ("source", "documents", "characters", "bytes", "train", "held_out", "exact", "near")


@dataclass(frozen=True)
class Statistics:
    """The data card of one source.

    Args:
        source: a key of `SOURCES`.
        documents: how many are left without duplicates: ``train`` and ``held_out``.
        characters: of these, in code points.
        bytes: of these, in UTF-8.
        train: documents for training.
        held_out: documents for measuring.
        exact: documents left out because another one has the same words.
        near: documents left out because another one has nearly the same.
    """

    source: str
    documents: int
    characters: int
    bytes: int
    train: int
    held_out: int
    exact: int
    near: int


def statistics(source: str) -> Statistics:
    """Count one source.

    Args:
        source: a key of `SOURCES`.

    Raises:
        DataError: there is no such source.
        AssetError: an asset has not been fetched yet.
    """
    dropped = duplicates(source)
    kept = [document for document in documents(source) if document.id not in dropped]
    splits = Counter(split_of(source, document.id) for document in kept)
    verdicts = Counter(dropped.values())
    return Statistics(
        source,
        len(kept),
        sum(len(document.text) for document in kept),
        sum(len(document.text.encode("utf-8")) for document in kept),
        *(splits[split] for split in SPLITS),
        *(verdicts[verdict] for verdict in ("exact", "near")),
    )


def run_cli(argv: Sequence[str], text: dict[str, str]) -> int:
    """The command ``aquila2-tut data stats``.

    Args:
        argv: what follows ``stats`` on the command line.
        text: the messages in the reader's language.

    Returns:
        The exit status.
    """
    parser = _parser("stats", text)
    parser.add_argument("--json", action="store_true", help=text["json"])
    arguments = parser.parse_args(argv)
    rows = [statistics(source) for source in arguments.sources or SOURCES]
    print(_as_json(rows) if arguments.json else _card(rows, text))
    return 0


def run_fetch(argv: Sequence[str], text: dict[str, str]) -> int:
    """The command ``aquila2-tut data fetch``: the assets that the sources are read from.

    Args:
        argv: what follows ``fetch`` on the command line.
        text: the messages in the reader's language.

    Returns:
        The exit status.

    Raises:
        AssetError: an asset is out of reach; those before it stay fetched.
    """
    chosen = _parser("fetch", text).parse_args(argv).sources or SOURCES
    for file in assets.fetch_all(dict.fromkeys(name for source in chosen for name in source_named(source).assets)):
        print(file)
    return 0


def _parser(action: str, text: dict[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"aquila2-tut data {action}", description=text[action], add_help=False)
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help=", ".join(SOURCES))
    add_common(parser, text)
    return parser


def _as_json(rows: Sequence[Statistics]) -> str:
    cards = []
    for row in rows:
        source = SOURCES[row.source]
        about = {"language": source.language, "licence": source.licence, "attribution": source.attribution}
        cards.append({**asdict(row), **about, "what": source.what})
    return json.dumps(cards, ensure_ascii=False, indent=2)


def _card(rows: Sequence[Statistics], text: dict[str, str]) -> str:
    """The figures as a table, and under it what each source is."""
    table = [[text[f"stats_{column}"] for column in COLUMNS]]
    table += [[row.source, *(f"{value:,}" for value in list(asdict(row).values())[1:])] for row in rows]
    widths = [max(map(_width, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(_pad(cell, width) for cell, width in zip(line, widths, strict=True)) for line in table]
    for row in rows:
        source = SOURCES[row.source]
        lines += ["", f"{row.source}: {source.what[text['tag']]}", f"  {source.licence}", f"  {source.attribution}"]
    return "\n".join(lines)


def _width(cell: str) -> int:
    """Columns on a terminal: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in cell)


def _pad(cell: str, width: int) -> str:
    blanks = " " * (width - _width(cell))
    return blanks + cell if cell[0].isdigit() else cell + blanks
