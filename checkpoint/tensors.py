"""The weight files of a model directory: which there are, and what tensors their headers list. Reads no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from checkpoint.digest import files_digest
from checkpoint.errors import CheckpointError
from checkpoint.files import refuse_pointer

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""Of tensors that are numbers as they are, in safetensors' names."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as its file's header describes it."""

    path: Path
    dtype: str
    """In safetensors' names: F32, BF16, F8_E4M3, I32, ..."""
    shape: tuple[int, ...]


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the files that model.safetensors.index.json lists. Raises CheckpointError."""
    index = directory / "model.safetensors.index.json"
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
    single = directory / "model.safetensors"
    if not single.exists():
        raise CheckpointError(f"{single}: missing (neither it nor model.safetensors.index.json is there)")
    return [single]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of the weight files, by name. Raises CheckpointError."""
    found: dict[str, StoredTensor] = {}
    for path in weight_files(directory):
        try:
            refuse_pointer(path)
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118  # not a mapping
                    view = file.get_slice(name)
                    if name in found:
                        raise CheckpointError(f"{path}: {name} stands in {found[name].path.name} too")
                    found[name] = StoredTensor(path, view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not readable as safetensors ({error})") from None
    return found


def check_tensors(
    stored: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[int, ...]], harmless: Mapping[str, str]
) -> None:
    """Raise CheckpointError unless every wanted tensor is there in its shape and a float, and every other is harmless.

    harmless: why a tensor that is not wanted changes nothing, by the end of its name.
    """
    for name, shape in wanted.items():
        tensor = stored.get(name)
        if tensor is None:
            directory = next(iter(stored.values())).path.parent if stored else Path()
            raise CheckpointError(f"{directory}: no tensor {name}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{tensor.path}: {name} is {tensor.dtype}; quantized checkpoints are not supported "
                f"(supported: {', '.join(FLOAT_DTYPES)})"
            )
        if tensor.shape != shape:
            raise CheckpointError(f"{tensor.path}: {name} is {list(tensor.shape)}, config.json says {list(shape)}")
    for name, tensor in stored.items():
        if name not in wanted and not name.endswith(tuple(harmless)):
            raise CheckpointError(f"{tensor.path}: {name}: nothing uses this tensor, so the model is another one")


def weights_digest(directory: Path) -> str:
    """Hex digest of every byte of the weight files. Raises CheckpointError."""
    return files_digest(weight_files(directory))
