"""Reads a GGUF file's header: metadata and the table of tensors. Every number in it is checked before it is used.

The file: a magic, a version, how many tensors and metadata entries there are; the entries; the table; and from the next
multiple of the alignment on, the tensors' bytes. Knows nothing of models, and reads no tensor.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

from checkpoint.errors import CheckpointError
from checkpoint.files import refuse_pointer
from checkpoint.gguf.block_types import BLOCK_TYPES, REMOVED_TYPES, BlockType

Scalar: TypeAlias = "int | float | bool | str"
Value: TypeAlias = "Scalar | list[Scalar]"

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_MOST_NAME_BYTES = 65535  # of a key; a tensor's name has at most 64
_LEAST_ENTRY_BYTES = 8 + 4 + 1  # of metadata: the length of its key, its type, a value of a byte
_LEAST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # of the table: the length of the name, one dimension, type and offset

_NUMBERS: dict[int, str] = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    10: "<Q",
    11: "<q",
    12: "<d",
}  # value types, as struct writes them
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of the table."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]  # the last dimension is a row's columns; the file has them the other way round
    offset: int  # of its first byte in the file
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says before its data."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: tuple[TensorEntry, ...]


class _Reader:
    """The bytes of a file from its beginning on; every read is checked against its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self.position = 0

    @property
    def remaining_bytes(self) -> int:
        return len(self._data) - self.position

    def fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: not a whole GGUF file: {what}")

    def take(self, num_bytes: int, what: str) -> bytes:
        if num_bytes > self.remaining_bytes:
            raise self.fault(f"it ends within {what}")
        self.position += num_bytes
        return self._data[self.position - num_bytes : self.position]

    def number(self, form: str, what: str) -> int | float:
        value: int | float = struct.unpack(form, self.take(struct.calcsize(form), what))[0]
        return value

    def count(self, what: str, form: str = "<Q") -> int:
        return int(self.number(form, what))

    def bounded(self, least_bytes: int, what: str) -> int:
        """A number of things of at least so many bytes each, of which the file has the space."""
        count = self.count(what)
        if count * least_bytes > self.remaining_bytes:
            raise self.fault(f"{what} is {count}, more than the file has bytes for")
        return count

    def text(self, what: str, most_bytes: int = 0) -> str:
        num_bytes = self.bounded(1, f"the length of {what}")
        if most_bytes and num_bytes > most_bytes:
            raise self.fault(f"{what} is {num_bytes} bytes long")
        try:
            return self.take(num_bytes, what).decode()
        except UnicodeDecodeError:
            raise self.fault(f"{what} is not UTF-8") from None


def read_header(path: Path) -> GgufHeader:
    """The header of a file. Raises CheckpointError for whatever is wrong with it, or with where its tensors lie."""
    try:
        refuse_pointer(path)
        with path.open("rb") as file, _mapped(file.fileno(), path) as data:
            reader = _Reader(data, path)
            num_tensors, num_entries = _read_start(reader)
            metadata = _read_metadata(reader, num_entries)
            return GgufHeader(path, metadata, _read_table(reader, num_tensors, _alignment(reader, metadata)))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


@contextlib.contextmanager
def _mapped(file: int, path: Path) -> Iterator[mmap.mmap]:
    try:
        data = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    except ValueError:  # an empty file has no mapping
        raise CheckpointError(f"{path}: not a GGUF file: it is empty") from None
    with data:
        yield data


def _read_start(reader: _Reader) -> tuple[int, int]:
    """The numbers of tensors and of metadata entries."""
    if reader.take(4, "its first four bytes") != _MAGIC:
        raise reader.fault("it does not begin with GGUF")
    version = reader.count("the version", "<I")
    if version not in _VERSIONS:
        is_swapped = version.to_bytes(4, "little")[:3] == b"\0\0\0"
        raise reader.fault("its numbers are big-endian" if is_swapped else f"version {version} is not 2 or 3")
    num_tensors = reader.bounded(_LEAST_TENSOR_BYTES, "the number of tensors")
    return num_tensors, reader.bounded(_LEAST_ENTRY_BYTES, "the number of metadata entries")


def _read_metadata(reader: _Reader, num_entries: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for index in range(num_entries):
        key = reader.text(f"the key of metadata entry {index}", _MOST_NAME_BYTES)
        if not key.isprintable():
            raise reader.fault(f"the key of metadata entry {index} is {key[:60]!r}")
        if key in metadata:
            raise reader.fault(f"{key} is given twice")
        metadata[key] = _read_value(reader, key)
    return metadata


def _read_value(reader: _Reader, key: str) -> Value:
    kind = reader.count(f"the type of {key}", "<I")
    if kind != _ARRAY:
        return _read_scalar(reader, kind, key)
    kind = reader.count(f"the type of {key}", "<I")
    if kind == _STRING:
        return [reader.text(key) for _ in range(reader.bounded(8, f"the length of {key}"))]
    if kind == _BOOL:
        return [_read_scalar(reader, kind, key) for _ in range(reader.bounded(1, f"the length of {key}"))]
    form = _number_form(reader, kind, key)
    size = struct.calcsize(form)
    count = reader.bounded(size, f"the length of {key}")
    return list(struct.unpack(f"<{count}{form[1:]}", reader.take(count * size, key)))


def _read_scalar(reader: _Reader, kind: int, key: str) -> Scalar:
    if kind == _STRING:
        return reader.text(key)
    if kind == _BOOL:
        value = reader.count(key, "<B")
        if value > 1:
            raise reader.fault(f"{key} is {value} and should be true or false")
        return bool(value)
    return reader.number(_number_form(reader, kind, key), key)


def _number_form(reader: _Reader, kind: int, key: str) -> str:
    form = _NUMBERS.get(kind)
    if form is None:
        raise reader.fault(f"{key} has the unknown type {kind}")
    return form


def _alignment(reader: _Reader, metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    is_power = isinstance(alignment, int) and not isinstance(alignment, bool) and alignment.bit_count() == 1
    if not is_power or not isinstance(alignment, int) or not 0 < alignment <= 1 << 30:
        raise reader.fault(f"general.alignment is {str(alignment)[:60]!r} and should be a power of two")
    return alignment


def _read_table(reader: _Reader, num_tensors: int, alignment: int) -> tuple[TensorEntry, ...]:
    """The table, with offsets from the file's beginning."""
    entries = [_read_entry(reader, index, alignment) for index in range(num_tensors)]
    begin = -(-reader.position // alignment) * alignment
    file_bytes = reader.position + reader.remaining_bytes
    found: dict[str, TensorEntry] = {}
    for entry in entries:
        if entry.name in found:
            raise reader.fault(f"{entry.name} is given twice")
        found[entry.name] = TensorEntry(entry.name, entry.kind, entry.shape, begin + entry.offset, entry.num_bytes)
        if begin + entry.offset + entry.num_bytes > file_bytes:
            raise reader.fault(f"it ends within {entry.name}, or that tensor's offset is wrong")
    _check_apart(reader, list(found.values()))
    return tuple(found.values())


def _read_entry(reader: _Reader, index: int, alignment: int) -> TensorEntry:
    name = reader.text(f"the name of tensor {index}", _MOST_NAME_BYTES)
    if not name or not name.isprintable():
        raise reader.fault(f"the name of tensor {index} is {name[:60]!r}")
    num_dimensions = reader.count(f"the number of dimensions of {name}", "<I")
    if not 1 <= num_dimensions <= _MOST_DIMENSIONS:
        raise reader.fault(f"{name} has {num_dimensions} dimensions")
    shape = tuple(reader.count(f"a dimension of {name}") for _ in range(num_dimensions))[::-1]
    number = reader.count(f"the type of {name}", "<I")
    kind = BLOCK_TYPES.get(number)
    if kind is None:
        removed = REMOVED_TYPES.get(number)
        said = f"{removed}, which llama.cpp has removed" if removed else f"{number}, which is unknown"
        raise reader.fault(f"the type of {name} is {said}")
    if 0 in shape or shape[-1] % kind.block_size:
        raise reader.fault(f"{name} is {list(shape)}, which {kind.name} in blocks of {kind.block_size} cannot be")
    offset = reader.count(f"the offset of {name}")
    if offset % alignment:
        raise reader.fault(f"the offset of {name}, {offset}, is no multiple of the alignment, {alignment}")
    num_rows = 1
    for size in shape[:-1]:
        num_rows *= size
    return TensorEntry(name, kind, shape, offset, num_rows * kind.row_bytes(shape[-1]))


def _check_apart(reader: _Reader, entries: list[TensorEntry]) -> None:
    in_order = sorted(entries, key=lambda entry: entry.offset)
    for first, second in pairwise(in_order):
        if first.offset + first.num_bytes > second.offset:
            raise reader.fault(f"{first.name} and {second.name} overlap, so an offset is wrong")
