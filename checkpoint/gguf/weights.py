"""The tensors of a GGUF under the names, and with the order of rows, that Hugging Face's layout gives them.

Numbers come as numbers, quantised rows as bytes. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from checkpoint.errors import CheckpointError
from checkpoint.gguf.config import head_dim
from checkpoint.gguf.container import TensorEntry, read_header
from checkpoint.gguf.metadata import Metadata
from checkpoint.gguf.names import ROPE_FACTORS, layout_name

Array: TypeAlias = npt.NDArray[Any]

_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # numpy has none
    "I8": "i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor, or one expert's of those that are stacked."""

    dtype: str  # the type's name; those of numbers are safetensors' names too
    shape: tuple[int, ...]  # of numbers; of quantised rows [rows, row_bytes]
    offset: int  # of its first byte in the file
    turned_head_dim: int = 0
    """Above 0, rows are stored so that in each head of so many those that turn together lie side by side."""

    def row_order(self) -> npt.NDArray[np.int64]:
        """Which stored row each row is: halves of heads one behind the other."""
        heads = np.arange(self.shape[0]).reshape(-1, self.turned_head_dim // 2, 2)
        return heads.swapaxes(1, 2).reshape(-1)


class GgufWeights:
    """A file's tensors by name. Raises CheckpointError for a file that is not whole."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        metadata = Metadata(header.metadata, path)
        self.path = path
        self.tensors: dict[str, GgufTensor] = {}
        architecture = metadata.text("general.architecture")
        for entry in header.tensors:
            if entry.name != ROPE_FACTORS:
                self._add(entry, architecture, metadata)
        self._data: Array | None = None

    def _add(self, entry: TensorEntry, architecture: str, metadata: Metadata) -> None:
        where = layout_name(entry.name, architecture)
        turned = head_dim(metadata, architecture) if where.has_interleaved_heads else 0
        is_whole = not turned or (turned % 2 == 0 and entry.shape[0] % turned == 0)
        if not is_whole or (where.is_stacked and len(entry.shape) != 3):
            raise metadata.refuse(f"{entry.name} is {list(entry.shape)}, which fits neither experts nor heads")
        names = [where.of_expert(str(index)) for index in range(entry.shape[0])] if where.is_stacked else [where.name]
        shape = entry.shape[1:] if where.is_stacked else entry.shape
        if not entry.kind.is_number:
            shape = (*shape[:-1], entry.kind.row_bytes(shape[-1]))
        for index, name in enumerate(names):
            if name in self.tensors:
                raise metadata.refuse(f"{entry.name}: another tensor is {name} already")
            offset = entry.offset + index * (entry.num_bytes // len(names))
            self.tensors[name] = GgufTensor(entry.kind.name, shape, offset, turned)

    def read(self, name: str, part: tuple[slice, ...] = ()) -> Array:
        """A copy of a tensor, or of a part of it along its leading dimensions. BF16 comes as its bits, uint16."""
        tensor = self.tensors[name]
        if self._data is None:
            self._data = np.memmap(self.path, np.uint8, mode="r")
        dtype = np.dtype(_NUMPY.get(tensor.dtype, "u1"))
        num_bytes = dtype.itemsize * int(np.prod(tensor.shape, dtype=np.int64))
        whole = self._data[tensor.offset : tensor.offset + num_bytes]
        if len(whole) < num_bytes:
            raise CheckpointError(f"{self.path}: changed while it was read")
        array = whole.view(dtype).reshape(tensor.shape)
        if tensor.turned_head_dim:
            array = array[tensor.row_order()[part[0] if part else slice(None)]]
            part = (slice(None), *part[1:])
        return np.array(array[part])
