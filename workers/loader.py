"""Reads the weights of a Hugging Face directory, one shard's share at a time. Knows nothing of what they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint.errors import CheckpointError
from checkpoint.tensors import FLOAT_DTYPES, stored_tensors
from workers.errors import ModelError


class Weights(Protocol):
    """Where a shard's weights come from."""

    def read(
        self, name: str, shape: tuple[int, ...], rows: slice | None = None, columns: slice | None = None
    ) -> Tensor:
        """A tensor, or this shard's rows or columns of it; `shape` is the whole tensor's."""


class Checkpoint:
    """Tensors of model.safetensors, or of the files that model.safetensors.index.json lists."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._directory = directory
        self._files: dict[Path, safe_open] = {}
        try:
            self._stored = stored_tensors(directory)
            for path in {tensor.path for tensor in self._stored.values()}:
                self._files[path] = safe_open(path, framework="pt")
        except (CheckpointError, SafetensorError, OSError) as error:
            raise ModelError(str(error)) from None

    def read(
        self, name: str, shape: tuple[int, ...], rows: slice | None = None, columns: slice | None = None
    ) -> Tensor:
        """A tensor, or this shard's rows or columns of it; `shape` is the whole tensor's and is checked."""
        stored = self._stored.get(name)
        if stored is None:
            raise ModelError(f"{self._directory}: no tensor {name}")
        if stored.shape != shape:
            raise ModelError(f"{stored.path}: {name} is {list(stored.shape)}, config.json says {list(shape)}")
        if stored.dtype not in FLOAT_DTYPES:
            raise ModelError(f"{stored.path}: {name} is {stored.dtype}; quantized checkpoints are not supported")
        view = self._files[stored.path].get_slice(name)
        tensor: Tensor
        if rows is not None:
            tensor = view[rows]
        elif columns is not None:
            tensor = view[:, columns]
        else:
            tensor = view[:]
        tensor = tensor.to(device=self._device, dtype=self._dtype).contiguous()
        # With one such weight all logits become NaN, and the arg max of those is id 0: an answer like any other.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            kind = str(self._dtype).removeprefix("torch.")
            raise ModelError(f"{stored.path}: {name} holds values that are not finite numbers in {kind}")
        return tensor
