"""Reads the weights of a Hugging Face directory, one shard's share at a time. Knows nothing of what they are for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.errors import ModelError

_SAMPLE_BYTES, _NUM_SAMPLES = 64 << 10, 256  # 16 MiB of each file: a model of any size starts quickly


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
        self._files: dict[Path, safe_open] = {}
        self._place: dict[str, Path] = {}
        for path in _weight_files(directory):
            try:
                file = safe_open(path, framework="pt")
                names = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: not readable as safetensors ({error})") from None
            self._files[path] = file
            self._place.update(dict.fromkeys(names, path))
        self._directory = directory

    def read(
        self, name: str, shape: tuple[int, ...], rows: slice | None = None, columns: slice | None = None
    ) -> Tensor:
        """A tensor, or this shard's rows or columns of it; `shape` is the whole tensor's and is checked."""
        path = self._place.get(name)
        if path is None:
            raise ModelError(f"{self._directory}: no tensor {name}")
        view = self._files[path].get_slice(name)
        if tuple(view.get_shape()) != shape:
            raise ModelError(f"{path}: {name} is {list(view.get_shape())}, config.json says {list(shape)}")
        tensor: Tensor
        if rows is not None:
            tensor = view[rows]
        elif columns is not None:
            tensor = view[:, columns]
        else:
            tensor = view[:]
        if not tensor.is_floating_point():
            raise ModelError(f"{path}: {name} is {tensor.dtype}; quantized checkpoints are not supported")
        return tensor.to(device=self._device, dtype=self._dtype).contiguous()


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index}: not a safetensors index ({error})") from None
        missing = [name for name in names if not (directory / name).exists()]
        if missing:
            raise ModelError(f"{directory / missing[0]}: missing")
        return [directory / name for name in names]
    single = directory / "model.safetensors"
    if not single.exists():
        raise ModelError(f"{single}: missing (neither it nor model.safetensors.index.json is there)")
    return [single]


def weights_digest(directory: Path) -> str:
    """Hex digest that tells checkpoints apart: sizes of the weight files, and pieces from all over each of them."""
    digest = hashlib.blake2b(digest_size=16)
    for path in _weight_files(directory):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for i in range(_NUM_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * i // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
