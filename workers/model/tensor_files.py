"""Files with tensors, opened for reading parts of them: safetensors and GGUF. Knows nothing of models or shards."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint.errors import CheckpointError
from checkpoint.gguf.weights import GgufWeights
from checkpoint.tensors import is_gguf


class TensorFile(Protocol):
    """One file. Names and shapes are those of checkpoint.tensors.stored_tensors."""

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """A tensor, or a part of it along its leading dimensions, in the file's dtype; quantised rows as uint8."""


class _Safetensors:
    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not readable as safetensors ({error})") from None

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        view = self._file.get_slice(name)
        tensor: Tensor = view[part or slice(None)] if view.get_shape() else self._file.get_tensor(name)
        return tensor


class _Gguf:
    def __init__(self, path: Path) -> None:
        self._weights = GgufWeights(path)

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        array = self._weights.read(name, part)
        if self._weights.tensors[name].dtype == "BF16":  # numpy has it as bits
            return torch.from_numpy(array.view("<i2")).view(torch.bfloat16)
        return torch.from_numpy(array)


def open_tensor_file(path: Path) -> TensorFile:
    """A weight file of a model directory. Raises CheckpointError."""
    return _Gguf(path) if is_gguf(path) else _Safetensors(path)
