"""A file in which every answer is kept as soon as it is there, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from aquila2_tut.evaluate.errors import EvaluateError

_SAMPLED = 4096  # numbers of each tensor that a fingerprint looks at


class Journal:
    """Answers by key, in a file that only grows.

    A line is a checksum, a space, and a JSON list of key and value. What a kill or a full disk left of the last line is
    taken off when the file is opened; a line that does not fit its checksum counts as not written.

    Args:
        file: where; made if it is not there. Not more than one process can have it open.

    Raises:
        EvaluateError: another process has it, or it cannot be written.
    """

    def __init__(self, file: str | Path) -> None:
        self.file, self._known = Path(file), {}
        self._lock = FileLock(f"{file}.lock")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self._out = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except Timeout:
            raise EvaluateError(f"{file}: another evaluation is writing to it: wait for it, or give another") from None
        except OSError as error:
            self._lock.release()
            raise EvaluateError(f"{file}: {error.strerror}: give a file that can be written") from None
        self._read()

    def _read(self) -> None:
        data = self.file.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._out, whole)
        for line in data[:whole].splitlines():
            checksum, _, body = line.partition(b" ")
            if checksum == _checksum(body):
                self._known.update(_answer(body))

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def add(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Keep answers; when this returns they are on the disk.

        Raises:
            EvaluateError: the disk is full, or gone.
        """
        answers = list(answers)
        bodies = [json.dumps(answer, ensure_ascii=True).encode() for answer in answers]
        lines = b"".join(_checksum(body) + b" " + body + b"\n" for body in bodies)
        try:
            while lines:
                lines = lines[os.write(self._out, lines) :]
            os.fsync(self._out)
        except OSError as error:
            raise EvaluateError(
                f"{self.file}: {error.strerror}: the answers up to here are kept; go on later"
            ) from None
        self._known.update(answers)

    def close(self) -> None:
        """Let another process have the file."""
        os.close(self._out)
        self._lock.release()


def _answer(body: bytes) -> dict[str, Any]:
    """What a line holds; nothing if it is none of ours."""
    try:
        key, value = json.loads(body)
    except (ValueError, TypeError, RecursionError):
        return {}
    return {key: value} if isinstance(key, str) else {}


def _checksum(body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(body)


def request_key(fingerprint: str, *request: Any) -> str:
    """The name of a request to a model: its hash.

    Args:
        fingerprint: the model's, see `fingerprint`.
        request: what is asked, as JSON can write it.
    """
    return hashlib.sha256(json.dumps([fingerprint, *request], sort_keys=True).encode()).hexdigest()


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of a model: another training, adapter, type or quantization gives another one.

    It looks at the configuration, the name, type and shape of every tensor, and 4,096 numbers spread over each: all of
    a large model would take minutes. A change that leaves these alone is not seen.
    """
    found = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, value in model.state_dict().items():
        for tensor in _plain_tensors(value):
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].float().cpu().numpy()
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + some.tobytes())
    return found.hexdigest()


def _plain_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors that a tensor is made of: torchao's hold codes and scales, and cannot be flattened themselves."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value
