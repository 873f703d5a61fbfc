"""KV blocks in 8 bits from worker to worker: what is lost stays small, and exact workers never take such a block."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.kv.encodings import LossMeter, prompts_of
from deploy.config import DEMO_MODEL, ROOT
from kvstore.config import KV_ENCODINGS
from kvstore.store import FragmentStore
from kvstore.tiers.memory_tier import MemoryTier
from tests.processes import KVNode
from tests.workers.forked_worker import ALWAYS, prompt, spec_for
from tests.workers.forked_worker import worker as real_worker
from tests.workers.tiny_llama import make_checkpoint
from tests.workers.worker_client import WorkerClient, disaggregate
from workers.config import EngineConfig
from workers.engine.step import BlockTransfer, TransferDone
from workers.kv.blocks import block_memory
from workers.kv.connector import KVConnector
from workers.kv.grid import FragmentGrid
from workers.model.registry import load_config
from workers.runtime.build import kv_fingerprint


def test_what_the_demo_model_loses() -> None:
    meter = LossMeter(str(DEMO_MODEL), prompt_tokens=90, new_tokens=9)
    prompts = prompts_of(ROOT / "workers", str(DEMO_MODEL), 3, 90)
    exact, int8, fp8 = (meter.measure(encoding, prompts) for encoding in KV_ENCODINGS)
    assert (exact.key_error_max, exact.value_error_max, exact.same_token_share) == (0, 0, 1)
    for loss, largest in ((int8, 0.02), (fp8, 0.045)):
        assert 0 < loss.key_error_mean < loss.key_error_max < largest
        assert 0 < loss.value_error_mean < loss.value_error_max < largest
        assert loss.num_compared_tokens == 24
        assert loss.same_token_share > 0.8
        assert loss.fragment_bytes < 0.4 * exact.fragment_bytes  # 8 bits and a scale for 32, rows of 24
    assert exact.zstd_fragment_bytes < 0.9 * exact.fragment_bytes


def connector_of(cache: torch.Tensor, grid: FragmentGrid, store: FragmentStore, encoding: str) -> KVConnector:
    return KVConnector([block_memory(cache, grid.layers_per_fragment, encoding)], [grid], store)


def num_moved(connector: KVConnector, transfer: BlockTransfer) -> int:
    """Blocks of a transfer that was started, when it has ended."""
    connector.wait([transfer], 10)
    count = connector.poll(transfer.transfer_id)
    connector.finish(TransferDone(transfer.transfer_id, count))
    return count


CACHE = (4, 6, 4, 2, 8, 16)  # layers, blocks, heads, K and V, slots, head_dim


@pytest.mark.parametrize("encoding", KV_ENCODINGS)
def test_blocks_pass_between_ranks_that_own_other_heads_and_layers(encoding: str) -> None:
    """Written by one rank, read by four, each with its heads and layers; the last block is short."""
    tier = MemoryTier()
    names, lengths = [bytes([i]) * 16 for i in range(3)], [8, 8, 5]
    source = torch.randn(CACHE)
    writer = connector_of(source, FragmentGrid(range(4), 2, 0, 4), FragmentStore([tier]), encoding)
    stored = BlockTransfer(1, 0, names, [4, 0, 2], lengths)
    writer.start_store(stored)
    assert num_moved(writer, stored) == 3
    writer.close()
    for layer in (0, 2):
        for head in (0, 2):
            cache = torch.zeros(2, 6, 2, *CACHE[3:])
            grid = FragmentGrid(range(layer, layer + 2), 2, head, 2)
            reader = connector_of(cache, grid, FragmentStore([tier]), encoding)
            loaded = BlockTransfer(1, 0, names, [1, 3, 5], lengths)
            reader.start_load(loaded)
            assert num_moved(reader, loaded) == 3
            reader.close()
            for to, of, length in zip((1, 3, 5), (4, 0, 2), lengths, strict=True):
                rows = source[layer : layer + 2, of, head : head + 2, :, :length]
                assert torch.allclose(cache[:, to, :, :, :length], rows, atol=0 if encoding == "none" else 0.2)
            assert not cache[:, [0, 2, 4]].any()


def test_a_block_in_other_numbers_is_refused_and_counted() -> None:
    """Names keep them apart; should they ever meet, the size does."""
    tier = MemoryTier()
    cache, transfer = torch.randn(CACHE), BlockTransfer(1, 0, [bytes(16)], [0], [8])
    grid = FragmentGrid(range(4), 4, 0, 4)
    writer = connector_of(cache, grid, FragmentStore([tier]), "int8")
    writer.start_store(transfer)
    assert num_moved(writer, transfer) == 1
    store = FragmentStore([tier])
    reader = connector_of(cache, grid, store, "none")
    reader.start_load(transfer)
    assert num_moved(reader, transfer) == 0
    assert store.stats().rejected == {"layout": 4}  # fragments
    writer.close()
    reader.close()


def test_the_fingerprint_says_what_is_lost(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("gqa", tmp_path)
    model = load_config(checkpoint)
    engines = [EngineConfig(str(checkpoint), kv_encoding=encoding) for encoding in KV_ENCODINGS]
    assert len({kv_fingerprint(engine, model, torch.float32, "weights") for engine in engines}) == 3


@pytest.mark.parametrize("other", [{"batch_invariant": True}, {"runner": "fake"}], ids=str)
def test_what_needs_every_bit_takes_no_loss(other: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^kv_encoding: fp8 changes bits"):
        EngineConfig("", kv_encoding="fp8", **other)


def test_workers_hand_over_in_8_bits_and_an_exact_one_takes_none_of_it(tmp_path: Path, kv_node: KVNode) -> None:
    checkpoint = make_checkpoint("gqa", tmp_path)
    specs = [spec_for(checkpoint, role, kv_node, kvstore=ALWAYS) for role in ("prefill", "decode")]
    lossy = [replace(spec, engine=replace(spec.engine, kv_encoding="int8")) for spec in specs]
    exact = replace(specs[1], worker_id="exact-0")
    token_ids = prompt(77, seed=11)
    with ExitStack() as stack:
        prefill, decode, other = (stack.enter_context(real_worker(spec)) for spec in (*lossy, exact))
        assert isinstance(other, WorkerClient)
        assert prefill.hello.kv_fingerprint == decode.hello.kv_fingerprint != other.hello.kv_fingerprint
        _, _, decoded = disaggregate(prefill, decode, token_ids)
        assert (decoded.num_transferred_blocks, decoded.num_computed_prompt_tokens) == (5, 0)
        rows = 3 * 2 * 77 * 2  # layers, K and V, tokens, heads
        head_dim = load_config(checkpoint).cache_specs[0].head_dim
        assert decode.load().pulled_bytes["host"] >= rows * (head_dim + 4)
        _, _, decoded = disaggregate(prefill, other, token_ids)
        assert (decoded.num_transferred_blocks, decoded.num_computed_prompt_tokens) == (0, 77)
