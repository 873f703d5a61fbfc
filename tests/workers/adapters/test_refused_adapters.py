"""An adapter that cannot be served ends its own requests, with the path and what is wrong; others go on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.peft_adapters import make_adapter, ref_of
from tests.workers.adapters.test_mixed_batches import GREEDY, config_of
from tests.workers.engine_group import EngineGroup
from tests.workers.tiny_llama import make_checkpoint, prompts
from workers.engine.adapters.ref import AdapterRef
from workers.engine.request import FinishReason
from workers.engine.step import TransferDone
from workers.runtime.rank_adapters import reason_of, with_reasons

NAME = "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def write_too_large(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A number that is infinite once it is multiplied by the adapter's scale."""
    tensors[NAME][1, 1] = torch.finfo(torch.float32).max
    return tensors


def with_tensors(
    adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **config: Any
) -> AdapterRef:
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    return ref_of(adapter)


@pytest.fixture
def copy(adapters: list[AdapterRef], tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapters[0].path, tmp_path / "copy"))


def check(group: EngineGroup, base: Path, good: AdapterRef, bad: AdapterRef, reason: FinishReason, error: str) -> None:
    """A bad adapter among good requests and those of the base."""
    asked, config = prompts(), config_of(base, group)
    expected = group.run(config, [asked[0], asked[2]], GREEDY, [good, None])
    found = group.run(config, [asked[0], asked[1], asked[2], asked[1]], GREEDY, [good, bad, None, bad])
    assert [found.completions[0], found.completions[2]] == expected.completions
    for end in (found.ends[1], found.ends[3]):
        assert end.reason is reason
        assert error in end.error
        assert bad.path in end.error
        assert "\n" not in end.error
    assert found.completions[1] == found.completions[3] == []
    assert all(found.ends[i].reason is FinishReason.LENGTH for i in (0, 2))


def test_missing(split: EngineGroup, base: Path, adapters: list[AdapterRef], tmp_path: Path) -> None:
    bad = AdapterRef("gone", b"\1" * 32, str(tmp_path / "gone"))
    check(split, base, adapters[1], bad, FinishReason.ADAPTER_FAILED, "no such directory")


def test_changed(split: EngineGroup, base: Path, adapters: list[AdapterRef], copy: Path) -> None:
    bad = replace(ref_of(copy), name="changed")
    with_tensors(copy, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    check(split, base, adapters[1], bad, FinishReason.ADAPTER_FAILED, "have changed since it was loaded")


def test_damaged(split: EngineGroup, base: Path, adapters: list[AdapterRef], copy: Path) -> None:
    path, bad = copy / "adapter_model.safetensors", replace(ref_of(copy), digest=b"\2" * 32)
    path.write_bytes(path.read_bytes()[:-9])
    check(split, base, adapters[1], bad, FinishReason.ADAPTER_FAILED, "data_offsets reach beyond the file")


def test_of_a_wider_model(split: EngineGroup, base: Path, folder: Path, adapters: list[AdapterRef]) -> None:
    other = make_checkpoint("head_dim", folder)
    bad = ref_of(make_adapter(other, folder / "of_head_dim"))
    error = "model.layers.0.self_attn.k_proj: is for a matrix [48, 32]; this model's is [16, 32]"
    check(split, base, adapters[1], bad, FinishReason.ADAPTER_UNFIT, error)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (rename("layers.2.mlp.down_proj", "layers.7.mlp.down_proj"), "layers.7.mlp.down_proj: this model has no such"),
        (rename("model.model.layers.1.mlp", "model.model.layers.1.ffn"), "layers.1.ffn.down_proj: this model has no"),
        (rename("model.model.layers.0.mlp.up_proj", "model.lm_head.up_proj"), "lm_head.up_proj: this model has no"),
        (write_too_large, f"{NAME} holds values that are no finite numbers"),
    ],
)
def test_of_another_model(
    split: EngineGroup,
    base: Path,
    adapters: list[AdapterRef],
    copy: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    error: str,
) -> None:
    bad = with_tensors(copy, change)
    check(split, base, adapters[1], bad, FinishReason.ADAPTER_UNFIT, error)


def test_of_too_high_a_rank(split: EngineGroup, base: Path, folder: Path, adapters: list[AdapterRef]) -> None:
    bad = ref_of(make_adapter(base, folder / "rank24", r=24))
    error = "its rank 24 is above max_lora_rank=16"
    check(split, base, adapters[1], bad, FinishReason.ADAPTER_UNFIT, error)


def test_the_same_bytes_in_another_place_are_no_reason_to_end_requests(
    single: EngineGroup, base: Path, adapters: list[AdapterRef], tmp_path: Path
) -> None:
    """The first path is gone; requests that name the other path are served."""
    good = adapters[0]
    bad = replace(good, path=str(tmp_path / "gone"))
    found = single.run(config_of(base, single), prompts(), GREEDY, [bad, good, good])
    assert found.ends[0].reason is FinishReason.ADAPTER_FAILED
    assert [end.reason for end in found.ends[1:]] == [FinishReason.LENGTH] * 2


def test_what_only_the_last_rank_finds_out_is_said(
    split: EngineGroup, base: Path, adapters: list[AdapterRef], copy: Path
) -> None:
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][-1, 0] = torch.finfo(torch.float32).max  # of the last rank's share; infinite once it is scaled
        return tensors

    error = f"{name} holds values that are no finite numbers"
    error = error if split.tp == 1 else f"rank 1: {copy}: {error}"
    check(split, base, adapters[1], with_tensors(copy, spoil), FinishReason.ADAPTER_UNFIT, error)


def test_an_adapter_that_only_another_rank_cannot_read_ends_with_that_ranks_error() -> None:
    ended = TransferDone(7, 0)
    here = TransferDone(7, 0, "own")
    there = reason_of(TransferDone(7, 0, "/a/x: is cut short", is_unfit=True))
    assert with_reasons(ended, ["", there]) == TransferDone(7, 0, "rank 1: /a/x: is cut short", is_unfit=True)
    assert with_reasons(ended, ["", reason_of(here)]) == TransferDone(7, 0, "rank 1: own")
    assert with_reasons(here, [reason_of(here), there]) == TransferDone(7, 0, "own", is_unfit=True)
