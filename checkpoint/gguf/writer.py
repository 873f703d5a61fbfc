"""Writes a GGUF file: header, metadata, table of tensors, and the tensors' bytes at multiples of the alignment.

The way back is checkpoint.gguf.container. Knows nothing of models, and holds one piece of a tensor at a time.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from checkpoint.gguf.block_types import BLOCK_TYPES, BlockType
from checkpoint.gguf.container import Scalar, Value

_MAGIC, _VERSION = b"GGUF", 3
_ALIGNMENT = 32  # what readers take where general.alignment is not given
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_FORMS = {_UINT32: "<I", _INT32: "<i", _FLOAT32: "<f", _BOOL: "<?"}
_NUMBER_OF = {kind.name: number for number, kind in BLOCK_TYPES.items()}


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor that is to be written."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]  # of numbers; the last dimension is a row's
    pieces: Callable[[], Iterable[bytes]]  # its bytes, in order

    @property
    def num_bytes(self) -> int:
        """Of its data."""
        num_rows = 1
        for size in self.shape[:-1]:
            num_rows *= size
        return num_rows * self.kind.row_bytes(self.shape[-1])


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Sequence[NewTensor]) -> None:
    """Raises OSError, as on a full disk; what is written until then stays, so the name should be a temporary one.

    Whole numbers become uint32, in lists int32; others float32: the types that llama.cpp's own converter writes.
    """
    with path.open("wb") as file:
        file.write(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_text(key) + _value(value))
        offset = 0
        for tensor in tensors:
            sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
            file.write(_text(tensor.name) + sizes + struct.pack("<IQ", _NUMBER_OF[tensor.kind.name], offset))
            offset += tensor.num_bytes + _padding(tensor.num_bytes)
        for tensor in tensors:
            _write_data(file, tensor)
        _pad(file)
        file.flush()
        os.fsync(file.fileno())


def _write_data(file: BinaryIO, tensor: NewTensor) -> None:
    _pad(file)
    written = 0
    for piece in tensor.pieces():
        written += file.write(piece)
    assert written == tensor.num_bytes, f"{tensor.name}: {written} bytes in place of {tensor.num_bytes}"


def _pad(file: BinaryIO) -> None:
    file.write(bytes(_padding(file.tell())))


def _padding(num_bytes: int) -> int:
    return -num_bytes % _ALIGNMENT


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Value) -> bytes:
    """Its type and itself."""
    if not isinstance(value, list):
        kind = _kind(value, _UINT32)
        return struct.pack("<I", kind) + _scalar(value, kind)
    kind = _kind(value[0], _INT32) if value else _STRING
    head = struct.pack("<IIQ", _ARRAY, kind, len(value))
    return head + b"".join(_scalar(each, kind) for each in value)


def _kind(value: Scalar, of_integers: int) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return of_integers
    return _FLOAT32 if isinstance(value, float) else _STRING


def _scalar(value: Scalar, kind: int) -> bytes:
    return _text(value) if isinstance(value, str) else struct.pack(_FORMS[kind], value)
