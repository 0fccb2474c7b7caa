"""A small reader of GGUF files: metadata as plain Python values, tensors de-quantized one at a time.

The file is memory-mapped, so opening one costs what its metadata costs and a tensor costs its own bytes.

Source: the GGUF specification of the ggml project (version 3) and its block layouts.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_ARRAY, _STRING, _BOOL = 9, 8, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}


class GGUFError(ValueError):
    """A file that is not a GGUF file, is cut short, or holds a type that this reader does not know."""


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies in the file.

    Args:
        name: its name in the file, e.g. "blk.0.attn_q.weight".
        shape: (out, in) as torch counts; the file stores it reversed.
        type: a key of `TYPES`.
        offset: bytes from the start of the file.
        nbytes: stored bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class BlockType:
    """A storage type: `block` values in `nbytes` bytes, and how to turn rows of blocks into float32."""

    name: str
    block: int
    nbytes: int
    decode: Callable[[np.ndarray, np.ndarray], None]


def _half(raw: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of every block. raw: (n, nbytes) uint8 -> (n, 1) float32."""
    return raw[:, at : at + 2].view(np.float16).astype(np.float32)


def _decode_f32(raw: np.ndarray, out: np.ndarray) -> None:
    out[:] = raw.view(np.float32)


def _decode_f16(raw: np.ndarray, out: np.ndarray) -> None:
    out[:] = raw.view(np.float16)


def _decode_bf16(raw: np.ndarray, out: np.ndarray) -> None:
    out.view(np.uint32)[:] = raw.view(np.uint16).astype(np.uint32) << 16


def _nibbles(raw: np.ndarray, at: int, out: np.ndarray) -> None:
    """16 bytes at `at` hold 32 values: the low halves are the first 16, the high halves the last."""
    packed = raw[:, at : at + 16]
    np.copyto(out[:, :16], packed & 15, casting="unsafe")
    np.copyto(out[:, 16:], packed >> 4, casting="unsafe")


def _decode_q4_0(raw: np.ndarray, out: np.ndarray) -> None:
    _nibbles(raw, 2, out)
    out -= 8
    out *= _half(raw, 0)


def _decode_q4_1(raw: np.ndarray, out: np.ndarray) -> None:
    _nibbles(raw, 4, out)
    out *= _half(raw, 0)
    out += _half(raw, 2)


def _decode_q8_0(raw: np.ndarray, out: np.ndarray) -> None:
    np.multiply(raw[:, 2:].view(np.int8), _half(raw, 0), out=out)


# Source: ggml's block layouts; the keys are ggml's type numbers.
TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, _decode_f32),
    1: BlockType("F16", 1, 2, _decode_f16),
    2: BlockType("Q4_0", 32, 18, _decode_q4_0),
    3: BlockType("Q4_1", 32, 20, _decode_q4_1),
    8: BlockType("Q8_0", 32, 34, _decode_q8_0),
    30: BlockType("BF16", 1, 2, _decode_bf16),
}


class _Cursor:
    """Reads little-endian values one after another and says where a file ends too early."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def scalar(self, code: str) -> Any:
        size = struct.calcsize(code)
        if self.at + size > len(self.data):
            raise GGUFError(
                f"{self.path}: truncated at byte {len(self.data)}, inside its header. Fetch the file again."
            )
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        raw = self.data[self.at : self.at + size]
        if len(raw) != size:
            raise GGUFError(f"{self.path}: truncated at byte {len(self.data)}, inside a string. Fetch the file again.")
        self.at += size
        return raw.decode("utf-8", errors="surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise GGUFError(f"{self.path}: unknown metadata type {kind} at byte {self.at}")
        return self.scalar(_SCALARS[kind])

    def array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        code = _SCALARS.get(kind)
        if code is None:
            return [self.value(kind) for _ in range(count)]
        size = struct.calcsize(code) * count
        if self.at + size > len(self.data):
            raise GGUFError(f"{self.path}: truncated at byte {len(self.data)}, inside an array. Fetch the file again.")
        values = np.frombuffer(self.data, dtype="<" + code, count=count, offset=self.at).tolist()
        self.at += size
        return values


class GGUFFile:
    """An open GGUF file.

    Args:
        path: the file.

    Attributes:
        metadata: every key of the file's header with its value.
        tensors: name -> `GGUFTensor`, in file order.

    Raises:
        GGUFError: not a GGUF file, an unknown version or type, or a file shorter than its header promises.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise GGUFError(f"{self.path}: not a GGUF file (its first bytes are not {MAGIC.decode()})")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(self._map, self.path)
        cursor.at = len(MAGIC)
        version = cursor.scalar("I")
        if version not in VERSIONS:
            raise GGUFError(f"{self.path}: GGUF version {version} is not known here (known: {VERSIONS})")
        tensor_count, pairs = cursor.scalar("Q"), cursor.scalar("Q")
        self.metadata: dict[str, Any] = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(pairs)}
        self.tensors: dict[str, GGUFTensor] = self._tensor_table(cursor, tensor_count)
        self._check_length()

    def _tensor_table(self, cursor: _Cursor, count: int) -> dict[str, GGUFTensor]:
        entries = []
        for _ in range(count):
            name = cursor.string()
            shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]
            entries.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
        align = self.metadata.get("general.alignment", 32)
        start = -(-cursor.at // align) * align
        return {name: self._entry(name, shape, kind, start + offset) for name, shape, kind, offset in entries}

    def _entry(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        if kind not in TYPES:
            known = ", ".join(t.name for t in TYPES.values())
            raise GGUFError(f"{self.path}: tensor {name} has ggml type {kind}; this reader knows {known}")
        block = TYPES[kind]
        if shape and shape[-1] % block.block:
            raise GGUFError(f"{self.path}: tensor {name} {shape}: rows are not a multiple of {block.block} values")
        return GGUFTensor(name, shape, kind, offset, prod(shape) // block.block * block.nbytes)

    def _check_length(self) -> None:
        for tensor in self.tensors.values():
            if tensor.offset + tensor.nbytes > len(self._map):
                raise GGUFError(
                    f"{self.path}: truncated: tensor {tensor.name} ends at byte {tensor.offset + tensor.nbytes}, "
                    f"the file at {len(self._map)}. Fetch the file again."
                )

    def tensor(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """One tensor as float32.

        Args:
            name: a key of `tensors`.
            out: float32 array of the tensor's shape to write into; a new one otherwise.

        Returns:
            The values, in torch's shape (out, in).

        Raises:
            GGUFError: the file has no tensor of that name, or `out` has another shape.
        """
        if name not in self.tensors:
            raise GGUFError(f"{self.path}: no tensor named {name}")
        entry = self.tensors[name]
        out = np.empty(entry.shape, np.float32) if out is None else out
        if out.shape != entry.shape:
            raise GGUFError(f"{self.path}: tensor {name} has shape {entry.shape}, not {out.shape}")
        kind = TYPES[entry.type]
        raw = np.frombuffer(self._map, np.uint8, entry.nbytes, entry.offset)
        kind.decode(raw.reshape(-1, kind.nbytes), out.reshape(-1, kind.block))
        del raw
        if hasattr(mmap, "MADV_DONTNEED"):
            # What has been decoded need not stay resident: a load then peaks at the model's own size.
            self._map.madvise(mmap.MADV_DONTNEED)
        return out

    def codes(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """The four-bit codes of a tensor as they are stored: each weight is step * code + offset, of its block of 32.

        Args:
            name: a key of `tensors`.

        Returns:
            Codes (out, in) uint8, steps and offsets (out, in / 32) float32; None for a tensor of another type.
        """
        entry = self.tensors[name]
        kind = TYPES[entry.type]
        if kind.name not in ("Q4_0", "Q4_1"):
            return None
        raw = np.frombuffer(self._map, np.uint8, entry.nbytes, entry.offset).reshape(-1, kind.nbytes)
        codes = np.empty((len(raw), kind.block), np.uint8)
        steps = _half(raw, 0)
        _nibbles(raw, 2 if kind.name == "Q4_0" else 4, codes)
        offsets = -8 * steps if kind.name == "Q4_0" else _half(raw, 2)
        return codes.reshape(entry.shape), steps.reshape(entry.shape[0], -1), offsets.reshape(entry.shape[0], -1)

    def close(self) -> None:
        """Unmaps the file. Arrays that `tensor` returned stay valid: they are copies."""
        self._map.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
