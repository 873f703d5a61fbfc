"""Reads the weights of a model directory, one shard's share at a time. Knows nothing of what they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from checkpoint.errors import CheckpointError
from checkpoint.tensors import FLOAT_DTYPES, stored_tensors
from workers.errors import ModelError
from workers.model.tensor_files import TensorFile, open_tensor_file


class Weights(Protocol):
    """Where a shard's weights come from."""

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] = (), as_stored: bool = False) -> Tensor:
        """A tensor, or a part of it along its leading dimensions; `shape` is the whole tensor's.

        as_stored: in the dtype of the file, whatever it is; else it must be floating-point, and comes as `dtype`.
        """

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """As it is stored; None: there is no such tensor."""


class Checkpoint:
    """Tensors of a directory's weight files, as checkpoint.tensors names them."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self._device = device
        self._directory = directory
        self._files: dict[Path, TensorFile] = {}
        try:
            self._stored = stored_tensors(directory)
            for path in {tensor.path for tensor in self._stored.values()}:
                self._files[path] = open_tensor_file(path)
        except CheckpointError as error:
            raise ModelError(str(error)) from None

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] = (), as_stored: bool = False) -> Tensor:
        """As in Weights; the shape is checked."""
        stored = self._stored.get(name)
        if stored is None:
            raise ModelError(f"{self._directory}: no tensor {name}")
        if stored.shape != shape:
            raise ModelError(f"{stored.path}: {name} is {list(stored.shape)}, config.json says {list(shape)}")
        if not as_stored and stored.dtype not in FLOAT_DTYPES:
            raise ModelError(f"{stored.path}: {name} is {stored.dtype}, where a floating-point tensor is wanted")
        tensor = self._files[stored.path].read(name, part)
        tensor = tensor.to(device=self._device, dtype=tensor.dtype if as_stored else self.dtype).contiguous()
        # With one such weight all logits become NaN, and the arg max of those is id 0: an answer like any other.
        if not _is_finite(tensor):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(f"{stored.path}: {name} holds values that are not finite numbers in {kind}")
        return tensor

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """As in Weights."""
        stored = self._stored.get(name)
        return None if stored is None else stored.shape


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # 8-bit floats have neither order nor isfinite
    return bool(torch.stack(wide.aminmax()).isfinite().all())
