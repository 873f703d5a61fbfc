"""The adapters of one rank: its share of their matrices in host memory, and in slots of the device.

Every product that takes adapters has space for all slots, taken at the start: an adapter is copied into its slot in
each of them. Knows nothing of requests, and nothing of who decides what is in which slot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from checkpoint.adapters.directory import Adapter, LoraModule, LoraTensor
from kernels.lora import LoraRows
from workers.config import EngineConfig
from workers.errors import AdapterError
from workers.parallel import Shard, stage_layers

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class LoraSizes:
    """Space for adapters on a rank."""

    num_slots: int
    max_rank: int


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A rank's share of what is added to one matrix: up (down x)."""

    down: Tensor  # [rank, the share's inputs]
    up: Tensor  # [rank, the share's outputs], times the scale


class Adapted(Protocol):
    """A product that takes adapters."""

    def put(self, slot: int, parts: Mapping[int, LowRank]) -> None:
        """Replace what is in a slot: some of the product's matrices, by their index; {}: the adapter has none."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a matrix of the checkpoint is in a product, and which part of it the rank has."""

    product: int  # index of it
    index: int  # of the matrix in the product
    num_outputs: int  # of the whole tensor
    num_inputs: int
    rows: slice
    columns: slice


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """A rank's share of an adapter, in host memory."""

    parts: Mapping[int, Mapping[int, LowRank]] = field(repr=False)  # by product, then by matrix


class LoraSlots:
    """Of one rank. `rows` says which rows of the step that is computed have which slot; None: none has one."""

    def __init__(self, sizes: LoraSizes, dtype: torch.dtype, device: torch.device, layers: range, num_layers: int):
        """layers: those of this rank's stage, of num_layers."""
        self.sizes, self.dtype, self.device = sizes, dtype, device
        self.rows: LoraRows | None = None
        self._layers, self._num_layers = layers, num_layers
        self._products: list[Adapted] = []
        self._places: dict[str, list[Place]] = {}
        self._refused: dict[str, str] = {}

    @classmethod
    def for_stage(
        cls, config: EngineConfig, num_layers: int, shard: Shard, dtype: torch.dtype, device: torch.device
    ) -> LoraSlots | None:
        """Of a rank, if its engine takes adapters. num_layers: of the whole model."""
        if not config.enable_lora:
            return None
        sizes = LoraSizes(config.max_loras, config.max_lora_rank)
        return cls(sizes, dtype, device, stage_layers(num_layers, shard.pp, shard.stage), num_layers)

    # ---------------------------------------------------------------------------------------------------------- start
    def add(self, product: Adapted) -> int:
        """A product takes adapters; its index."""
        self._products.append(product)
        return len(self._products) - 1

    def add_place(self, name: str, place: Place) -> None:
        """A matrix of the checkpoint is there."""
        self._places.setdefault(name, []).append(place)

    def refuse(self, name: str, why: str) -> None:
        """A module of the model that takes no adapters here."""
        self._refused[name] = why

    # ----------------------------------------------------------------------------------------- in any thread: loading
    def load(self, adapter: Adapter, content: bytes) -> LoadedAdapter:
        """The rank's share. content: of the file of tensors. Raises AdapterError when it does not fit this model."""
        buffer = memoryview(content)
        parts: dict[int, dict[int, LowRank]] = {}
        for module in adapter.modules:
            for place in self._places_of(module, adapter):
                parts.setdefault(place.product, {})[place.index] = self._share(module, place, adapter, buffer)
        return LoadedAdapter(parts)

    def _places_of(self, module: LoraModule, adapter: Adapter) -> Sequence[Place]:
        """None where another stage has it."""
        places = self._places.get(module.name)
        if places is not None:
            return places
        found = _LAYER.search(f".{module.name}.")
        layer = int(found[1]) if found else self._num_layers
        if layer < self._num_layers and layer not in self._layers:
            return ()  # that stage's ranks know whether there is such a module
        why = self._refused.get(module.name, "this model has no such matrix that takes adapters")
        raise AdapterError(f"{adapter.directory}: {module.name}: {why}", is_unfit=True)

    def _share(self, module: LoraModule, place: Place, adapter: Adapter, buffer: memoryview) -> LowRank:
        where = f"{adapter.directory}: {module.name}"
        if module.rank > self.sizes.max_rank:
            why = f"its rank {module.rank} is above max_lora_rank={self.sizes.max_rank}"
            raise AdapterError(f"{where}: {why}", is_unfit=True)
        if (module.outputs, module.inputs) != (place.num_outputs, place.num_inputs):
            has, wants = [module.outputs, module.inputs], [place.num_outputs, place.num_inputs]
            raise AdapterError(f"{where}: is for a matrix {has}; this model's is {wants}", is_unfit=True)
        down = _read(module.a, buffer)[:, place.columns].to(self.dtype)
        up = (_read(module.b, buffer)[place.rows].float() * module.scale).to(self.dtype).T
        for tensor, share in ((module.a, down), (module.b, up)):
            if not bool(share.isfinite().all()):
                kind = str(self.dtype).removeprefix("torch.")
                why = f"holds values that are no finite numbers in {kind}"
                raise AdapterError(f"{adapter.directory}: {tensor.name} {why}", is_unfit=True)
        if self.device.type == "cuda":
            return LowRank(down.contiguous().pin_memory(), up.contiguous().pin_memory())
        return LowRank(down.contiguous(), up.contiguous())

    # -------------------------------------------------------------------------------------------------------- in a step
    def begin(self, slots: npt.NDArray[np.int32] | None, fixed_order: bool) -> None:
        """The step that follows has these slots, one of each row of the batch; None: no row has one."""
        self.rows = None if slots is None else LoraRows.of(slots, self.device, fixed_order)

    def put(self, slot: int, loaded: LoadedAdapter) -> None:
        """Replace what is in a slot, in the order of the steps."""
        for index, product in enumerate(self._products):
            product.put(slot, loaded.parts.get(index, {}))


def _read(tensor: LoraTensor, buffer: memoryview) -> Tensor:
    """In memory of its own: a view would keep all of the file for as long as the adapter is held."""
    return torch.frombuffer(bytearray(buffer[tensor.begin : tensor.end]), dtype=_DTYPES[tensor.dtype]).view(
        tensor.shape
    )
