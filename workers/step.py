"""One engine step as data: what the scheduler decides, what the runner reports, and the wire form of the first.

The plan is complete in itself: a rank holds KV blocks and weights, and needs nothing else to carry it out. It travels
from the leader to the other ranks as one flat int32 array, never as pickled Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

NAME_WORDS = 4  # a block name is 16 bytes
NO_TOKEN = -1
"""Sampled where the logits were no finite numbers: the request cannot go on."""


def pending_token(place: int) -> int:
    """Stands for a token that the step before chooses, `place`-th of its samples, and that only the device knows."""
    return -1 - place


def pending_place(token_id: int) -> int | None:
    """The inverse; None for a token that is known."""
    return None if token_id >= 0 else -1 - token_id


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How the one token after a scheduled chunk is chosen."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    position: int  # in the completion; the counter of the generator


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """A run of tokens of one request to compute in this step."""

    request_id: str  # stays with the leader
    token_ids: Sequence[int]  # the last may be a pending_token
    start_position: int  # of token_ids[0] in the request
    write_from: int  # positions below it are in the cache already and are not written again
    block_table: Sequence[int]
    sample: SampleSpec | None  # set when token_ids ends at the last known token

    @property
    def num_scheduled_tokens(self) -> int:
        """Tokens to compute."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class BlockTransfer:
    """Whole blocks (the last may be short) to pull from the tiers, or to publish to them."""

    request_id: str  # stays with the leader
    block_names: Sequence[bytes]
    block_ids: Sequence[int]
    num_tokens: Sequence[int]  # filled slots of each block


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """The plan of one step: loads first, then the forward pass, then stores and write-backs."""

    requests: Sequence[ScheduledRequest] = ()
    loads: Sequence[BlockTransfer] = ()
    stores: Sequence[BlockTransfer] = ()  # somebody waits for them: the step ends when the tiers have them
    write_backs: Sequence[BlockTransfer] = ()  # for a later turn or a failover: copied now, published beside the steps
    preempted_ids: Sequence[str] = ()

    @property
    def total_num_scheduled_tokens(self) -> int:
        """Tokens of the forward pass."""
        return sum(r.num_scheduled_tokens for r in self.requests)

    @property
    def is_empty(self) -> bool:
        """Nothing to carry out."""
        return not (self.requests or self.loads or self.stores or self.write_backs)


@dataclass(frozen=True, slots=True)
class ModelRunnerOutput:
    """What became of a plan; the same on every rank but for the tokens, which only the leader needs."""

    sampled_token_ids: Sequence[int] = ()  # one per scheduled request that samples, in the plan's order
    num_loaded_blocks: Sequence[int] = ()  # one per load: blocks that verified on every rank, from the first on
    num_stored_blocks: Sequence[int] = ()  # one per store: blocks that every rank stored, from the first on
    duration_s: float = field(default=0.0, compare=False)


class ModelRunner(Protocol):
    """Carries out plans on one rank; every rank of a worker gets the same ones."""

    def start(self, plan: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        """One step; what is returned waits for its end."""
        ...


class Executor(Protocol):
    """Carries out plans on all ranks of a worker."""

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """One step."""
        ...

    def start(self, plan: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        """One step, which may still run on return; what is returned waits for its end. Steps run in order."""
        ...

    def stop(self) -> None:
        """Let the other ranks go; no step may follow."""
        ...


# ----------------------------------------------------------------------------------------------------- the wire form
def encode_plan(plan: SchedulerOutput) -> npt.NDArray[np.int32]:
    """The plan without its request ids, as int32 words."""
    words: list[int] = [len(plan.requests), len(plan.loads), len(plan.stores), len(plan.write_backs)]
    for r in plan.requests:
        words += [len(r.token_ids), r.start_position, r.write_from, len(r.block_table), int(r.sample is not None)]
        words += r.token_ids
        words += r.block_table
        if r.sample is not None:
            words += _encode_sample(r.sample)
    for transfer in (*plan.loads, *plan.stores, *plan.write_backs):
        words.append(len(transfer.block_names))
        words += np.frombuffer(b"".join(transfer.block_names), np.int32).tolist()
        words += transfer.block_ids
        words += transfer.num_tokens
    return np.array(words, np.int32)


def decode_plan(words: npt.NDArray[np.int32]) -> SchedulerOutput:
    """The inverse of encode_plan; request ids come back empty."""
    reader = _Reader(words)
    num_requests, num_loads, num_stores, num_write_backs = reader.take(4)
    requests = [_decode_request(reader) for _ in range(num_requests)]
    loads = [_decode_transfer(reader) for _ in range(num_loads)]
    stores = [_decode_transfer(reader) for _ in range(num_stores)]
    write_backs = [_decode_transfer(reader) for _ in range(num_write_backs)]
    return SchedulerOutput(requests=requests, loads=loads, stores=stores, write_backs=write_backs)


class _Reader:
    def __init__(self, words: npt.NDArray[np.int32]) -> None:
        self._words = words
        self._at = 0

    def array(self, count: int) -> npt.NDArray[np.int32]:
        self._at += count
        return self._words[self._at - count : self._at]

    def take(self, count: int) -> list[int]:
        values: list[int] = self.array(count).tolist()
        return values


def _encode_sample(sample: SampleSpec) -> Iterator[int]:
    floats = np.array([sample.temperature, sample.top_p], np.float32).view(np.int32).tolist()
    seed = np.array([sample.seed], np.uint64).view(np.int32).tolist()
    yield from (*floats, sample.top_k, *seed, sample.position)


def _decode_request(reader: _Reader) -> ScheduledRequest:
    num_tokens, start, write_from, num_blocks, samples = reader.take(5)
    token_ids, block_table = reader.take(num_tokens), reader.take(num_blocks)
    sample = None
    if samples:
        temperature, top_p = reader.array(2).view(np.float32).tolist()
        (top_k,) = reader.take(1)
        (seed,) = reader.array(2).copy().view(np.uint64).tolist()
        (position,) = reader.take(1)
        sample = SampleSpec(temperature, top_p, top_k, seed, position)
    return ScheduledRequest("", token_ids, start, write_from, block_table, sample)


def _decode_transfer(reader: _Reader) -> BlockTransfer:
    (count,) = reader.take(1)
    joined = reader.array(count * NAME_WORDS).tobytes()
    names = [joined[i : i + 4 * NAME_WORDS] for i in range(0, len(joined), 4 * NAME_WORDS)]
    return BlockTransfer("", names, reader.take(count), reader.take(count))
