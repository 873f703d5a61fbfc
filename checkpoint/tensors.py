"""The weight files of a model directory: which there are, and what tensors their headers list. Reads no weights."""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from checkpoint.digest import files_digest
from checkpoint.errors import CheckpointError
from checkpoint.files import refuse_pointer
from checkpoint.gguf.directory import WEIGHTS_NAME

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""Of tensors that are numbers as they are, in safetensors' names."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as its file's header describes it."""

    path: Path
    dtype: str
    """In safetensors' names: F32, BF16, F8_E4M3, I32, ... Of quantised rows in a GGUF: Q4_K, ..."""
    shape: tuple[int, ...]
    """Of quantised rows in a GGUF: rows, and bytes of each."""


@dataclass(frozen=True, slots=True)
class WantedTensor:
    """A tensor that a model reads."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOAT_DTYPES
    """Those that it may be stored in, in safetensors' names."""
    other_shapes: tuple[tuple[int, ...], ...] = ()
    """That writers give it, too."""
    has_any_shape: bool = False
    is_optional: bool = False

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """All that it may have."""
        return (self.shape, *self.other_shapes)


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, the files that model.safetensors.index.json lists, or model.gguf. Raises CheckpointError."""
    index, single, gguf = (
        directory / name for name in ("model.safetensors.index.json", "model.safetensors", WEIGHTS_NAME)
    )
    if gguf.exists():
        if index.exists() or single.exists():
            raise CheckpointError(f"{gguf}: beside files of safetensors, so which of them is the model is open")
        return [gguf]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index ({error})") from None
        for name in names:
            # A name that leads elsewhere would be read, and served, from outside of the model's folder.
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f"{index}: {name!r} is not the name of a file beside it")
        missing = [name for name in names if not (directory / name).exists()]
        if missing:
            raise CheckpointError(f"{directory / missing[0]}: missing, and listed in {index.name}")
        return [directory / name for name in names]
    if not single.exists():
        raise CheckpointError(f"{single}: missing (neither it nor model.safetensors.index.json is there)")
    return [single]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of the weight files, by name. Raises CheckpointError."""
    found: dict[str, StoredTensor] = {}
    for path in weight_files(directory):
        for name, tensor in (_of_gguf(path) if is_gguf(path) else _of_safetensors(path)).items():
            if name in found:
                raise CheckpointError(f"{path}: {name} stands in {found[name].path.name} too")
            found[name] = tensor
    return found


def is_gguf(path: Path) -> bool:
    """Whether a weight file is a GGUF, and not of safetensors."""
    return path.name == WEIGHTS_NAME


def _of_gguf(path: Path) -> dict[str, StoredTensor]:
    from checkpoint.gguf.weights import GgufWeights

    tensors = GgufWeights(path).tensors
    return {name: StoredTensor(path, tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _of_safetensors(path: Path) -> dict[str, StoredTensor]:
    # Here, since `switchyard router` imports this module and has no safetensors: it reads no weights.
    from safetensors import SafetensorError, safe_open

    try:
        refuse_pointer(path)
        with safe_open(path, framework="np") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            return {name: StoredTensor(path, view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors ({error})") from None


def check_tensors(
    stored: Mapping[str, StoredTensor], wanted: Mapping[str, WantedTensor], harmless: tuple[str, ...]
) -> None:
    """Raise CheckpointError unless every wanted tensor is there in its shape and dtype, and every other is harmless.

    harmless: ends of the names of tensors that change nothing.
    """
    for name, want in wanted.items():
        tensor = stored.get(name)
        if tensor is None:
            if want.is_optional:
                continue
            directory = next(iter(stored.values())).path.parent if stored else Path()
            raise CheckpointError(f"{directory}: no tensor {name}")
        if tensor.dtype not in want.dtypes:
            raise CheckpointError(
                f"{tensor.path}: {name} is {tensor.dtype}; by config.json it must be {' or '.join(want.dtypes)}"
            )
        if tensor.shape not in want.shapes and not want.has_any_shape:
            raise CheckpointError(f"{tensor.path}: {name} is {list(tensor.shape)}, config.json says {list(want.shape)}")
    for name, tensor in stored.items():
        if name not in wanted and not name.endswith(harmless):
            raise CheckpointError(f"{tensor.path}: {name}: nothing uses this tensor, so the model is another one")


def have_same_bytes(one: StoredTensor, other: StoredTensor, names: tuple[str, str]) -> bool:
    """Whether two tensors, of these names in their files, are the same in dtype, shape and every byte."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if is_gguf(one.path) or is_gguf(other.path):
        return _gguf_bytes(one.path, names[0]) == _gguf_bytes(other.path, names[1])
    with _mapped(one.path, names[0]) as first, _mapped(other.path, names[1]) as second:
        return first == second


def _gguf_bytes(path: Path, name: str) -> bytes:
    from checkpoint.gguf.weights import GgufWeights

    return GgufWeights(path).read(name).tobytes()


@contextlib.contextmanager
def _mapped(path: Path, name: str) -> Iterator[memoryview]:
    """The bytes of a tensor. Its file is a header's length (8 bytes, little-endian), the header, then the tensors."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        header_bytes = int.from_bytes(whole[:8], "little")
        begin, end = json.loads(whole[8 : 8 + header_bytes])[name]["data_offsets"]
        with memoryview(whole) as view, view[8 + header_bytes + begin : 8 + header_bytes + end] as tensor:
            yield tensor


def weights_digest(directory: Path) -> str:
    """Hex digest of every byte of the weight files. Raises CheckpointError."""
    return files_digest(weight_files(directory))
