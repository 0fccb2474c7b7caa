"""A client of BAAI's ModelHub, the service that the Aquila2 checkpoints were first published on.

Three calls make up the service: a name gives a number, a name gives a list of files, and number and file give the
address and the size of a download. Whatever the service answers is parsed and checked; nothing in it is evaluated, and
no file name of its choice reaches beyond the folder that the caller named.

Source: FlagAI, flagai/model/file_utils.py (the calls and their fields).
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from filelock import FileLock
from tqdm.auto import tqdm

BASE_URL = "https://model.baai.ac.cn/api"
BASE_URL_VARIABLE = "AQUILA2_TUT_MODELHUB"
TIMEOUT = (10.0, 60.0)  # seconds: to connect, and between two pieces
ATTEMPTS = 5
CHUNK = 1 << 16  # what a cut connection costs at most: requests drops a piece that is not full
MAX_ANSWER = 1 << 20  # bytes; the longest real list of files is a few kilobytes

NO_NAME = "the server's name cannot be resolved (no network?)"
NO_ANSWER = "no answer in time"
FILE_MISSING = "40002"  # the service's code for a file that the model does not have
PLAIN_FILES = (".json", ".txt", ".model", ".md", ".jinja")
# A Python list of plain quoted strings, without escapes: nothing else reaches ast.literal_eval.
QUOTED = r"""(?:'[^'"\\\[\]]*'|"[^'"\\\[\]]*")"""
PYTHON_LIST = re.compile(rf"\[\s*(?:{QUOTED}\s*(?:,\s*{QUOTED}\s*)*,?)?\s*\]")
FILE_NAME = re.compile(r"\w[\w .+()-]*")


class ModelHubError(RuntimeError):
    """The ModelHub could not be reached, or answered something that cannot be used."""


def parse_model_id(text: str) -> str:
    """Read the answer to the first call: a number, bare or quoted.

    Raises:
        ModelHubError: if it is anything else; the service answers "null" for a name that it does not know.
    """
    number = text.strip().strip("\"'")
    if not re.fullmatch(r"[0-9]{1,12}", number):
        raise ModelHubError(f"the ModelHub knows no such model (its answer: {_short(text)})")
    return number


def parse_file_list(text: str) -> list[str]:
    """Read the answer to the second call: a list of file names, in JSON or in Python's notation.

    Raises:
        ModelHubError: if it is no list of strings, or one name is not the plain name of a file.
    """
    names = _read_list(text.strip())
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ModelHubError(f"the ModelHub's list of files cannot be read: {_short(text)}")
    return [check_file_name(name) for name in names]


def _read_list(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return ast.literal_eval(text) if PYTHON_LIST.fullmatch(text) else None


def check_file_name(name: str) -> str:
    """Return `name` if it names a file inside a folder and nothing else.

    Raises:
        ModelHubError: for a path, a parent folder, a hidden file or a control character.
    """
    if not FILE_NAME.fullmatch(name) or ".." in name or len(name) > 200:
        raise ModelHubError(
            f"the ModelHub names a file {_short(name)}, which is not a plain file name; nothing was saved"
        )
    return name


def choose_files(names: Sequence[str]) -> list[str]:
    """Choose what a checkpoint needs: small files first, then one kind of weights, safetensors before .bin.

    Code (.py) and optimizer states are left out: this package runs no code that comes with a checkpoint.

    Raises:
        ModelHubError: if there is no config.json or no weights.
    """
    weights = [n for n in names if n.endswith(".safetensors")]
    weights = weights or [n for n in names if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", n)]
    if "config.json" not in names or not weights:
        raise ModelHubError(f"no checkpoint among {len(names)} files: config.json and weights are needed")
    return sorted(n for n in names if n.endswith(PLAIN_FILES)) + sorted(weights)


class ModelHub:
    """The three calls, and a download that goes on where it was cut off.

    Args:
        base_url: the service's address; by default the environment's AQUILA2_TUT_MODELHUB, or else BAAI's.
        progress: show a bar for each file.
    """

    def __init__(self, base_url: str | None = None, progress: bool = True) -> None:
        self.base_url = (base_url or os.environ.get(BASE_URL_VARIABLE) or BASE_URL).rstrip("/")
        self.progress = progress

    def model_id(self, name: str) -> str:
        """First call: the number of a model.

        Returns:
            The number, in digits.
        """
        # The misspelt path is the service's own.
        return parse_model_id(self._call("GET", "searchModleByName", params={"model_name": name}))

    def files(self, name: str) -> list[str]:
        """Second call: the names of a model's files, each checked."""
        return parse_file_list(self._call("GET", "searchModelFileByName", params={"model_name": name}))

    def location(self, model_id: str, file: str) -> tuple[str, int]:
        """Third call: where a file can be downloaded.

        Returns:
            (address, size in bytes)

        Raises:
            ModelHubError: if the file is missing or the answer lacks a usable address and size.
        """
        text = self._call("POST", "downloadCode", json={"model_id": model_id, "checkpoint_name": file})
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ModelHubError(f"the ModelHub's answer for {file} cannot be read: {_short(text)}")
        if str(answer.get("code")) == FILE_MISSING:
            raise ModelHubError(f"the ModelHub no longer has {file}")
        url, size = answer.get("url"), _to_size(answer.get("size"))
        if not isinstance(url, str) or urlsplit(url).scheme not in ("http", "https") or size is None:
            raise ModelHubError(f"the ModelHub gives no usable address and size for {file}: {_short(text)}")
        return url, size

    def download(self, name: str, folder: Path) -> Path:
        """Download a model into `folder`; a run that was cut off is taken up again.

        Files gather in a hidden folder beside it, and config.json moves last, so that `folder` never looks whole
        before it is.

        Returns:
            `folder`

        Raises:
            ModelHubError: if the service fails, answers nonsense, or the disk is too small.
        """
        if (folder / "config.json").is_file():
            return folder
        model_id, wanted = self.model_id(name), choose_files(self.files(name))
        stage = folder.parent / f".{folder.name}.part"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if (folder / "config.json").is_file():
                return folder  # another process was faster
            stage.mkdir(exist_ok=True)
            for file in wanted:
                if not (folder / file).is_file():
                    self._fetch(model_id, file, stage)
            _move_all(wanted, stage, folder)
        return folder

    def _fetch(self, model_id: str, file: str, stage: Path) -> None:
        """Bring one file into `stage` whole, in at most ATTEMPTS tries that each get nowhere."""
        url, size = self.location(model_id, file)
        target, part = stage / file, stage / f"{file}.part"
        if target.is_file() and target.stat().st_size == size:
            return
        _check_room(stage, size - _size_of(part), file)
        _receive_all(url, size, part, self.progress)
        os.replace(part, target)

    def _call(self, method: str, path: str, **arguments: Any) -> str:
        url = f"{self.base_url}/{path}"
        try:
            with requests.request(method, url, timeout=TIMEOUT, stream=True, **arguments) as answer:
                answer.raise_for_status()
                body = answer.raw.read(MAX_ANSWER + 1, decode_content=True)
        except (requests.RequestException, OSError) as error:
            raise ModelHubError(f"{url}: {reason(error)}") from error
        if len(body) > MAX_ANSWER:
            raise ModelHubError(f"{url}: an answer of more than {MAX_ANSWER} bytes is none that this service gives")
        return body.decode("utf-8", errors="replace")


def _receive_all(url: str, size: int, part: Path, progress: bool) -> None:
    """Fill `part` up to `size` bytes, going on after an interrupted connection.

    Raises:
        ModelHubError: when ATTEMPTS connections in a row brought nothing new.
    """
    part.touch()
    idle, problem = 0, "the connection was cut"
    with tqdm(total=size, unit="B", unit_scale=True, desc=part.stem, disable=not progress) as bar:
        while (before := part.stat().st_size) != size:
            try:
                _receive(url, size, part, bar)
            except (requests.RequestException, OSError) as error:
                problem = reason(error)
            idle = 0 if part.stat().st_size > before else idle + 1
            if idle >= ATTEMPTS:
                raise ModelHubError(
                    f"{part.stem} stopped at {part.stat().st_size} of {size} bytes ({problem}); "
                    "run the command again to go on from there"
                )
            time.sleep(min(0.1 * 2**idle, 5) if idle else 0)


def _receive(url: str, size: int, part: Path, bar: tqdm) -> None:
    """Open one connection and append what it brings; a server that ignores Range starts the file anew."""
    have = part.stat().st_size
    have = have if have < size else 0
    # Compressed transfer would make the byte counts of Range meaningless.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        answer.raise_for_status()
        resumed = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        start = have if answer.status_code == requests.codes.partial_content and resumed else 0
        bar.n = start
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            for piece in answer.iter_content(CHUNK):
                if file.tell() + len(piece) > size:
                    file.truncate(0)  # another file is being served: nothing of it may be taken up again
                    raise ModelHubError(f"{part.stem} is longer than the {size} bytes that the ModelHub named")
                file.write(piece)
                bar.update(len(piece))


def _move_all(files: Sequence[str], stage: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for file in sorted(files, key=lambda name: name == "config.json"):
        if (stage / file).exists():
            os.replace(stage / file, folder / file)
    shutil.rmtree(stage, ignore_errors=True)


def _check_room(folder: Path, needed: int, file: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ModelHubError(
            f"{file} needs {needed / 1e9:.1f} GB more; the disk of {folder} has {free / 1e9:.1f} GB free"
        )


def _size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _to_size(value: Any) -> int | None:
    """Read a size in bytes, which the service gives as a number or as digits."""
    text = str(value)
    return int(text) if re.fullmatch(r"[0-9]{1,15}", text) else None


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def reason(error: BaseException) -> str:
    """Say in one short line why a connection failed."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"the server answered {response.status_code}"
    text = str(error)
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection was cut"
    if isinstance(error, requests.Timeout | TimeoutError):
        return NO_ANSWER
    if "resolve" in text or "Name or service" in text or "getaddrinfo" in text:
        return NO_NAME
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return text.splitlines()[0][:200] if text else type(error).__name__
