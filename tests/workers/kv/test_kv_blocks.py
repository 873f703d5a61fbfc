"""Fragments out of the cache and into it: in place for a host's cache, through a buffer for a device's."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from workers.engine.step import BlockTransfer
from workers.errors import ModelError
from workers.kv.blocks import HostBlocks, StagedBlocks, block_memory

LAYERS, BLOCKS, HEADS, BLOCK_SIZE, HEAD_DIM, GROUP = 6, 9, 2, 4, 8, 3
TRANSFER = BlockTransfer(1, 0, [b""] * 3, [7, 2, 5], [BLOCK_SIZE, BLOCK_SIZE, 3])
MEMORIES = pytest.mark.parametrize("memory", [HostBlocks, StagedBlocks])


def a_cache(dtype: torch.dtype, fill: str = "random") -> torch.Tensor:
    shape = (LAYERS, BLOCKS, HEADS, 2, BLOCK_SIZE, HEAD_DIM)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(shape, generator=generator) if fill == "random" else torch.full(shape, 99.0)
    return values.to(dtype)


def expected(cache: torch.Tensor) -> list[torch.Tensor]:
    return [
        cache[first : first + GROUP, block_id, head, :, :num_tokens].contiguous()
        for block_id, num_tokens in zip(TRANSFER.block_ids, TRANSFER.num_tokens, strict=True)
        for first in range(0, LAYERS, GROUP)
        for head in range(HEADS)
    ]


@MEMORIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_fragment_is_a_group_of_layers_of_one_head_of_a_block(memory: type, dtype: torch.dtype) -> None:
    cache = a_cache(dtype)
    blocks = memory(cache, GROUP)
    for fragment, right in zip(blocks.gather(TRANSFER)(), expected(cache), strict=True):
        assert fragment.tobytes() == right.view(torch.uint8).numpy().tobytes()


def test_what_is_gathered_from_a_device_stays_when_the_cache_changes() -> None:
    cache = a_cache(torch.float32)
    right = [fragment.clone() for fragment in expected(cache)]
    gathered = StagedBlocks(cache, GROUP).gather(TRANSFER)
    cache.zero_()
    assert all(a.tobytes() == b.numpy().tobytes() for a, b in zip(gathered(), right, strict=True))


def test_in_host_memory_nothing_is_copied() -> None:
    cache = a_cache(torch.float32)
    fragments = HostBlocks(cache, GROUP).gather(TRANSFER)()
    cache.zero_()
    assert not any(fragment.any() for fragment in fragments)


@MEMORIES
@pytest.mark.parametrize("num_whole", [0, 2, 3])
def test_whole_blocks_are_in_the_cache_after_the_finish_and_others_are_untouched(memory: type, num_whole: int) -> None:
    source, target = a_cache(torch.bfloat16), a_cache(torch.bfloat16, fill="constant")
    filling = memory(target, GROUP).fill(TRANSFER)
    per_block = len(filling.fragments) // 3
    for buffer, fragment in list(zip(filling.fragments, HostBlocks(source, GROUP).gather(TRANSFER)(), strict=True))[
        : num_whole * per_block
    ]:
        np.copyto(buffer, fragment.reshape(buffer.shape))
    filling.finish(num_whole)
    right = a_cache(torch.bfloat16, fill="constant")
    for block_id, num_tokens in list(zip(TRANSFER.block_ids, TRANSFER.num_tokens, strict=True))[:num_whole]:
        right[:, block_id, :, :, :num_tokens] = source[:, block_id, :, :, :num_tokens]
    assert torch.equal(target, right)


@pytest.mark.parametrize("encoding", ["int8", "fp8"])
def test_in_eight_bits_blocks_are_nearly_what_they_were_and_others_untouched(encoding: str) -> None:
    source, target = a_cache(torch.float32), a_cache(torch.float32, fill="constant")
    fragments = StagedBlocks(source, GROUP, encoding).gather(TRANSFER)()
    filling = StagedBlocks(target, GROUP, encoding).fill(TRANSFER)
    for buffer, fragment in zip(filling.fragments, fragments, strict=True):
        assert fragment.nbytes == buffer.nbytes
        np.copyto(buffer, fragment)
    filling.finish(3)
    right = a_cache(torch.float32, fill="constant")
    for block_id, num_tokens in zip(TRANSFER.block_ids, TRANSFER.num_tokens, strict=True):
        right[:, block_id, :, :, :num_tokens] = source[:, block_id, :, :, :num_tokens]
    largest = right.abs().amax(-1, keepdim=True)
    assert ((target - right).abs() <= largest / 14).all()
    assert torch.equal(target[:, 0], right[:, 0])
    assert not torch.equal(target, right)


@pytest.mark.parametrize("encoding", ["none", "int8"])
def test_a_stage_without_layers_of_a_group_moves_nothing(encoding: str) -> None:
    memory = block_memory(torch.zeros(0, BLOCKS, HEADS, 2, BLOCK_SIZE, HEAD_DIM), 1, encoding)
    assert memory.gather(TRANSFER)() == []
    filling = memory.fill(TRANSFER)
    assert filling.fragments == []
    filling.finish(3)


def test_what_is_copied_stays_when_the_blocks_are_reused() -> None:
    cache = a_cache(torch.float32)
    right = [fragment.clone() for fragment in expected(cache)]
    gathered = HostBlocks(cache, GROUP).gather(replace(TRANSFER, is_copied=True))
    cache.zero_()
    assert all(a.tobytes() == b.numpy().tobytes() for a, b in zip(gathered(), right, strict=True))


def test_a_latent_cache_is_refused_by_name() -> None:
    latent = torch.zeros(1, BLOCKS, 1, 1, BLOCK_SIZE, HEAD_DIM)
    with pytest.raises(ModelError, match="a latent cache is not moved to the tiers yet"):
        block_memory(latent, 1, "int8")
