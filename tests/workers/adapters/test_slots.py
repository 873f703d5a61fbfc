"""What a rank's slots hold in memory: no more than the adapters, and what was taken at the start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from checkpoint.adapters.directory import open_adapter
from tests.router.adapters.lora_files import MODULES, write_adapter
from workers.model.lora.experts import LoraExperts
from workers.model.lora.slots import LoraSizes, LoraSlots, LowRank, Place
from workers.model.products.dense import DenseExperts
from workers.model.weight_format import ExpertMatrices
from workers.parallel import Shard

EXPERTS, HIDDEN, WIDTH, RANK, SLOTS = 3, 8, 6, 4, 2


class Anything:
    def put(self, slot: int, parts: Mapping[int, LowRank]) -> None:
        raise AssertionError("nothing is put")


def slots_of(dtype: torch.dtype = torch.float32) -> LoraSlots:
    return LoraSlots(LoraSizes(SLOTS, RANK), dtype, torch.device("cpu"), range(3), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("half", [False, True])
def test_a_loaded_adapter_keeps_no_more_than_its_share(tmp_path: Path, dtype: torch.dtype, half: bool) -> None:
    slots = slots_of(dtype)
    for name, (outputs, inputs) in MODULES.items():
        columns = slice(0, inputs // 2 if half else inputs)
        slots.add_place(name, Place(slots.add(Anything()), 0, outputs, inputs, slice(0, outputs), columns))
    loaded = slots.load(*open_adapter(write_adapter(tmp_path / "a")))
    tensors = [tensor for parts in loaded.parts.values() for part in parts.values() for tensor in (part.down, part.up)]
    assert len(tensors) == 2 * len(MODULES)
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_what_is_put_into_slots_of_experts_goes_where_space_was_taken_at_the_start() -> None:
    slots = slots_of()
    base = DenseExperts(torch.zeros(EXPERTS, 2 * WIDTH, HIDDEN), torch.zeros(EXPERTS, HIDDEN, WIDTH))
    names = [tuple(f"model.layers.0.mlp.experts.{e}.{kind}" for e in range(EXPERTS)) for kind in ("gate", "up", "down")]
    experts = LoraExperts(base, slots, ExpertMatrices(*names, HIDDEN, WIDTH), Shard())
    space = {tensor.untyped_storage().data_ptr() for tensor in vars(experts._space).values()}
    for seed in range(3):
        torch.manual_seed(seed)
        for slot in range(SLOTS):
            rank = RANK - seed
            parts = {
                3 * expert + which: LowRank(torch.randn(rank, inputs), torch.randn(rank, outputs))
                for expert in range(EXPERTS)
                for which, (inputs, outputs) in enumerate([(HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)])
            }
            experts.put(slot, parts)
            for index, part in experts._parts[slot].items():
                assert torch.equal(part.down, parts[index].down)
                assert torch.equal(part.up, parts[index].up)
                assert {part.down.untyped_storage().data_ptr(), part.up.untyped_storage().data_ptr()} <= space
    experts.put(0, {})
    assert set(experts._parts) == {1}
