"""Assembles a GGUF from the finished files of a compression: names, stacked experts, turned rows of heads.

Knows nothing of how blocks are made. Rows of blocks are turned as rows of numbers are, since no block crosses a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from checkpoint.files import read_json
from checkpoint.gguf.block_types import BLOCK_TYPES, QUANTISED, BlockType
from checkpoint.gguf.container import Value
from checkpoint.gguf.names import ROPE_FACTORS, file_name
from checkpoint.gguf.writer import NewTensor, write_gguf
from compress.gguf.metadata import architecture_of, model_metadata, parts_of, rope_factors, sampling_metadata
from compress.gguf.mixtures import mixture_named
from compress.gguf.tokenizer import tokenizer_metadata
from compress.recipe import Recipe
from workers.model.config import ModelConfig
from workers.model.tensor_layout import HEAD

_NUMBERS = {kind.name: kind for kind in BLOCK_TYPES.values() if kind.is_number}
_OF_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class GgufContents:
    """All that is known of a file before its tensors are."""

    metadata: dict[str, Value]
    rope_factors: list[float]
    architecture: str
    head_dim: int
    is_tied: bool
    block_types: Mapping[str, str]  # by name of the matrix
    warning: str


def gguf_contents(directory: Path, model: ModelConfig, recipe: Recipe) -> GgufContents:
    """recipe: with its block types. Raises CompressError or CheckpointError."""
    metadata = model_metadata(model, directory.resolve().name, mixture_named(recipe.scheme.name).file_type)
    tokenizer = tokenizer_metadata(directory, model.vocab_size, model.eos_token_ids)
    return GgufContents(
        {**metadata, **sampling_metadata(read_json(directory / "generation_config.json")), **tokenizer.values},
        rope_factors(model),
        architecture_of(model),
        parts_of(model).attention.head_dim,
        model.tie_word_embeddings,
        {name: scheme.block_type for name, scheme in recipe.schemes if scheme.block_type},
        tokenizer.warning,
    )


def write_file(path: Path, contents: GgufContents, sources: Mapping[str, Path]) -> None:
    """sources: for each tensor in Hugging Face's layout the safetensors file that has it. Raises OSError."""
    entries: dict[str, _Entry] = {}
    for name, source in sources.items():
        where = file_name(name, contents.architecture)
        if where is None or (contents.is_tied and name == HEAD + ".weight"):
            continue
        entry = entries.setdefault(where.name, _Entry(contents.head_dim if where.has_interleaved_heads else 0))
        entry.parts[where.expert or 0] = (source, name)
    tensors = [entry.tensor(name, contents.block_types) for name, entry in entries.items()]
    if contents.rope_factors:
        factors = torch.tensor(contents.rope_factors, dtype=torch.float32)
        tensors.append(NewTensor(ROPE_FACTORS, _NUMBERS["F32"], tuple(factors.shape), lambda: [_bytes(factors)]))
    write_gguf(path, contents.metadata, tensors)


@dataclass(slots=True)
class _Entry:
    """A tensor of the file: one of the layout, or one for each expert."""

    turned_head_dim: int  # 0: rows keep their order
    parts: dict[int, tuple[Path, str]] = field(default_factory=dict)  # file and name, by expert

    def tensor(self, name: str, block_types: Mapping[str, str]) -> NewTensor:
        source, first = self.parts[0]
        with safe_open(source, framework="pt") as file:
            view = file.get_slice(first)
            shape, dtype = tuple(view.get_shape()), view.get_dtype()
        kind = self._kind(name, first, len(shape), dtype, block_types)
        if not kind.is_number:
            shape = (*shape[:-1], shape[-1] // kind.block_bytes * kind.block_size)
        if "_exps." in name:
            shape = (len(self.parts), *shape)
        return NewTensor(name, kind, shape, lambda: self._pieces(kind))

    def _kind(
        self, name: str, first: str, num_dimensions: int, dtype: str, block_types: Mapping[str, str]
    ) -> BlockType:
        """llama.cpp wants vectors, and what chooses among experts, in 32 bits."""
        block_type = block_types.get(first.removesuffix(".weight"))
        if block_type is not None and dtype == "U8":
            return QUANTISED[block_type]
        is_wide = num_dimensions < 2 or "gate_inp" in name
        return _NUMBERS["F32" if is_wide or dtype not in _OF_DTYPE.values() else dtype]

    def _pieces(self, kind: BlockType) -> Iterator[bytes]:
        dtype = next((dtype for dtype, name in _OF_DTYPE.items() if name == kind.name), torch.uint8)
        for expert in range(len(self.parts)):
            source, name = self.parts[expert]
            with safe_open(source, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
            if self.turned_head_dim:
                halves = tensor.unflatten(0, (-1, 2, self.turned_head_dim // 2))
                tensor = halves.transpose(1, 2).flatten(0, 2)
            yield _bytes(tensor.to(dtype))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
