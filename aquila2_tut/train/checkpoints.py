"""Folders that are there as a whole or not at all, so that no run is ever taken up from half a checkpoint."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import TrainError

UNFINISHED = ".unfinished-"  # begins the name of a folder that is being written
_NOTHING = 1 << 20  # bytes; with less room than this a disk is full


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Gives a folder to write into, which becomes `target` at the end of the block.

    Until then it has another name, so a run that is killed leaves nothing that looks complete. Everything is on the
    disk before the name changes, for a machine that loses its power.

    Args:
        target: the folder to make; one that is there already is replaced.

    Raises:
        TrainError: the disk is full. What was there before is still there.
    """
    staging = unfinished(target)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        _make(staging, target)
        yield staging
        for file in [*staging.rglob("*"), staging]:
            _to_disk(file)
    except Exception as error:  # each library has its own for a full disk
        if not _is_full(error, target.parent):
            raise
        shutil.rmtree(staging, ignore_errors=True)
        raise TrainError(f"the disk is full, {target} could not be written. {last_good(target.parent)}") from error
    _replace(staging, target)
    _to_disk(target.parent)


def _make(staging: Path, target: Path) -> None:
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        if _is_full(error, target.parent):
            raise
        raise TrainError(f"{target} cannot be made: {error.strerror}; name another folder") from None


def unfinished(target: Path) -> Path:
    """The name of a folder while it is being written."""
    return target.with_name(UNFINISHED + target.name)


def _is_full(error: Exception, place: Path) -> bool:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return True
    # torch does not say why a file could not be written.
    return isinstance(error, RuntimeError) and shutil.disk_usage(place).free < _NOTHING


def last_good(folder: Path) -> str:
    """What is left of a run that has to end, in words."""
    found = checkpoints(folder)
    return f"The last good checkpoint is {found[-1]}" if found else f"There is no checkpoint in {folder} yet"


def _replace(staging: Path, target: Path) -> None:
    """Puts a folder in another's place; a folder cannot be replaced in one step unless it is empty."""
    old = target.with_name(UNFINISHED + "old-" + target.name)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(staging, target)
    shutil.rmtree(old, ignore_errors=True)


def _to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first: folders `checkpoint-STEP`."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def forget_unfinished(folder: Path) -> None:
    """Removes what a run that was killed has left half written."""
    for left in folder.glob(UNFINISHED + "*"):
        shutil.rmtree(left, ignore_errors=True)


def refuse_other_settings(place: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """A run goes on with the settings it began with, or it would be a mixture of two.

    Args:
        place: the run, or its checkpoint.
        before: its settings as JSON gave them back.
        now: those that are asked for.

    Raises:
        TrainError: one of them is another; the message names it.
    """
    for name, value in json.loads(json.dumps(now)).items():
        if value != before.get(name):
            raise TrainError(
                f"{place} holds a run with {name}={before.get(name)!r}, not {value!r}: a run goes on with the settings "
                "it began with. Give those, or another folder"
            )


_STEP = re.compile(r"checkpoint-(\d+)")
