"""KV transfer on one host, from the paged cache of a prefill worker to that of a decode worker, and nothing else.

Two processes, each with a cache of its own, share a KV node's arena. One publishes chunk after chunk, the other pulls
each as soon as it is there; neither waits for one transfer before it starts the next, as no step of an engine does.
Every byte is counted once, and every check is on. A copy of as many bytes in one process is timed before each run, so
that both have seen the same machine.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import torch
import xxhash
from torch import Tensor

from bench.kv.tiers import BenchShape, measure_memcpy, node_process
from bench.rows import Measurement
from kvstore.format.copying import is_compiled
from kvstore.store import FragmentStore
from kvstore.tiers.host.host_tier import HostTier
from workers.engine.step import BlockTransfer, TransferDone
from workers.kv.blocks import HostBlocks
from workers.kv.connector import KVConnector
from workers.kv.grid import FragmentGrid

_STEP_S = 0.01  # less than any step of a prefill


@dataclass(frozen=True, slots=True)
class CacheShape:
    """A rank's cache, and how much of it is handed off. The defaults are Llama-3.1-8B's in bf16, 1,024 tokens."""

    num_layers: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    chunk_blocks: tuple[int, ...] = (16, 16, 16, 12, 4)
    """Blocks that are published at once, as a prefill worker does: chunks of 256 tokens, and a last one of 64."""
    num_runs: int = 25

    @property
    def num_blocks(self) -> int:
        """Of a cache, and of one run."""
        return sum(self.chunk_blocks)

    @property
    def fragment_bytes(self) -> int:
        """All layers of one block and one head."""
        return self.num_layers * 2 * self.block_size * self.head_dim * torch.bfloat16.itemsize

    @property
    def num_fragments(self) -> int:
        """Of one run."""
        return self.num_blocks * self.num_kv_heads

    def empty(self) -> Tensor:
        """A cache of zeros, every page of it touched."""
        shape = (self.num_layers, self.num_blocks, self.num_kv_heads, 2, self.block_size, self.head_dim)
        return torch.zeros(shape, dtype=torch.bfloat16).fill_(0)

    def chunks(self, run: bytes) -> list[BlockTransfer]:
        """What is published and pulled at once; a run has names of its own."""
        names = [run + i.to_bytes(4, "big") for i in range(self.num_blocks)]
        lasts = list(itertools.accumulate(self.chunk_blocks))
        return [
            BlockTransfer(i, 0, names[last - count : last], range(last - count, last), [self.block_size] * count)
            for i, (last, count) in enumerate(zip(lasts, self.chunk_blocks, strict=True))
        ]

    @contextmanager
    def mover(self, cache: Tensor, host_address: str) -> Iterator[BlockMover]:
        """A rank's, over the host tier alone."""
        grid = FragmentGrid(range(self.num_layers), self.num_layers, 0, self.num_kv_heads)
        with (
            closing(FragmentStore([HostTier(host_address)])) as store,
            closing(BlockMover(KVConnector([HostBlocks(cache, self.num_layers)], [grid], store))) as mover,
        ):
            yield mover


class BlockMover:
    """A connector, and which of its transfers have ended. For one thread."""

    def __init__(self, connector: KVConnector) -> None:
        self._connector = connector
        self._moving: dict[int, BlockTransfer] = {}
        self.ended, self._on_ended = multiprocessing.Pipe(duplex=False)
        """Readable when a transfer has ended; finished() is to be called then."""
        connector.on_ended = lambda: self._on_ended.send_bytes(b"1")  # shorter than PIPE_BUF: threads do not mix

    def close(self) -> None:
        """Close the connector."""
        self._connector.close()
        self.ended.close()
        self._on_ended.close()

    def prepare(self, chunk: BlockTransfer) -> None:
        """As KVConnector.prepare."""
        self._connector.prepare(chunk)

    def start_store(self, chunk: BlockTransfer) -> None:
        """Publish blocks."""
        self._moving[chunk.transfer_id] = chunk
        self._connector.start_store(chunk)

    def start_load(self, chunk: BlockTransfer) -> None:
        """Pull blocks."""
        self._moving[chunk.transfer_id] = chunk
        self._connector.start_load(chunk)

    def finished(self) -> Iterator[tuple[BlockTransfer, bool]]:
        """Waits until a transfer has ended; those that have, and whether all their blocks were moved."""
        self.ended.recv_bytes()
        for transfer_id in self._connector.ended():
            chunk, count = self._moving.pop(transfer_id), self._connector.poll(transfer_id)
            self._connector.finish(TransferDone(transfer_id, count))
            yield chunk, count == len(chunk.block_ids)


class KVTransferFailed(Exception):
    """Not all blocks came, or not as they were."""


def measure_paged_kv_transfer(arena_dir: str, shape: CacheShape | None = None) -> list[Measurement]:
    """GB/s of the KV transfer and its share of the copy's, and the same with put and get one after the other."""
    shape = shape or CacheShape()
    bandwidth = BenchShape(shape.fragment_bytes, shape.num_fragments, num_runs=3)
    memcpy: list[float] = []
    at_once: list[float] = []
    in_turn: list[float] = []
    cache = shape.empty().copy_(torch.randn(shape.empty().shape))
    with (
        node_process(arena_dir, bandwidth) as host_address,
        _receiver(shape, host_address) as receiver,
        shape.mover(cache, host_address) as sender,
    ):
        for _ in range(shape.num_runs + 1):  # the first warms up
            memcpy.append(measure_memcpy(bandwidth).median_gb_per_s)
            for rates, is_at_once in ((at_once, True), (in_turn, False)):
                cache.view(torch.int16).bitwise_not_()  # other bytes than the receiver has from the run before
                rates.append(bandwidth.num_bytes / _kv_transfer(shape, sender, receiver, is_at_once) / 1e9)
                receiver.send(None)
                if receiver.recv() != _digest(cache):
                    raise KVTransferFailed("the caches differ after the KV transfer")
    setting: dict[str, object] = {
        "fragment_bytes": shape.fragment_bytes,
        "bytes": bandwidth.num_bytes,
        "chunk_blocks": list(shape.chunk_blocks),
        "reserved_ahead": True,
        "compiled": is_compiled(),
        "cache": f"{shape.num_layers} layers, {shape.num_kv_heads} heads of {shape.head_dim}, bf16",
    }
    beside = {"memcpy": statistics.median(memcpy[1:])}
    rows = []
    for name, rates in (("paged", at_once[1:]), ("paged_in_turn", in_turn[1:])):
        shares = [rate / limit for rate, limit in zip(rates, memcpy[1:], strict=True)]
        rows.append(Measurement(f"kv_transfer.{name}", "GB/s", rates, setting, beside))
        rows.append(Measurement(f"kv_transfer.{name}_share", "of memcpy", shares, setting))
    return rows


def _kv_transfer(shape: CacheShape, sender: BlockMover, receiver: Connection, at_once: bool) -> float:
    """Seconds from the first publish until the last block is in the other cache; slots for what is published next is
    being made meanwhile, and for the first chunk before, as when each is computed in between."""
    chunks = shape.chunks(os.urandom(12))
    num_published = 0
    sender.prepare(chunks[0])
    time.sleep(_STEP_S)
    began_s = time.perf_counter()
    for chunk, following in itertools.zip_longest(chunks, chunks[1:]):
        if following is not None:
            sender.prepare(following)
        sender.start_store(chunk)
    while num_published < len(chunks):
        for chunk, is_whole in sender.finished():
            if not is_whole:
                raise KVTransferFailed("not all blocks were published")
            num_published += 1
            if at_once:
                receiver.send(chunk)
    if not at_once:
        for chunk in chunks:
            receiver.send(chunk)
    for _ in chunks:
        ended_s, is_whole = receiver.recv()
        if not is_whole:
            raise KVTransferFailed("not all blocks came")
    return float(ended_s - began_s)


@contextmanager
def _receiver(shape: CacheShape, host_address: str) -> Iterator[Connection]:
    """The other process: for a chunk (when it was through with it, whether all of it came), for None its digest."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=_receive, args=(other, shape, host_address), daemon=True)
    process.start()
    other.close()
    try:
        pipe.recv()  # it is ready; EOFError when it ended
        yield pipe
    finally:
        pipe.close()
        process.join(timeout=20)


def _receive(pipe: Connection, shape: CacheShape, host_address: str) -> None:
    torch.set_num_threads(1)
    cache = shape.empty()
    with shape.mover(cache, host_address) as mover:
        pipe.send(None)
        with suppress(EOFError):  # the measurement is over
            while True:
                ready = wait([pipe, mover.ended])
                if mover.ended in ready:
                    for _, is_whole in mover.finished():
                        pipe.send((time.perf_counter(), is_whole))  # one clock for all processes of a machine
                if pipe not in ready:
                    continue
                if (chunk := pipe.recv()) is None:
                    pipe.send(_digest(cache))
                else:
                    mover.start_load(chunk)


def _digest(cache: Tensor) -> int:
    return xxhash.xxh3_64_intdigest(cache.view(torch.uint8).numpy().data)
