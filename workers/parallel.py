"""How a model is cut into tensor- and pipeline-parallel shards, and the process groups that join them.

Rank r is stage r // tp, column r % tp. Layers of the stages are as even as can be, earlier stages take the rest.
Knows nothing of models or requests.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from workers.errors import StepFailed, rank_name

# A rank waits for the next plan as long as the leader has none. A dead peer closes its sockets, which ends the wait.
_FOREVER = timedelta(days=365)
_TEXT_BYTES = 400


def stage_layers(num_layers: int, pp: int, stage: int) -> range:
    """The layers of one pipeline stage."""
    size, rest = divmod(num_layers, pp)
    first = stage * size + min(stage, rest)
    return range(first, first + size + (stage < rest))


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's position in the tp x pp grid."""

    tp: int = 1
    pp: int = 1
    tp_rank: int = 0
    stage: int = 0

    @classmethod
    def of_rank(cls, rank: int, tp: int, pp: int) -> Shard:
        """The position of a global rank."""
        return cls(tp=tp, pp=pp, tp_rank=rank % tp, stage=rank // tp)

    @property
    def rank(self) -> int:
        """The global rank."""
        return self.stage * self.tp + self.tp_rank

    @property
    def is_first_stage(self) -> bool:
        """Holds the embedding."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the head."""
        return self.stage == self.pp - 1

    def slice_of(self, size: int) -> slice:
        """This rank's equal share of a dimension of `size`; the caller checked that it divides."""
        share = size // self.tp
        return slice(self.tp_rank * share, (self.tp_rank + 1) * share)


class PeerLeft(StepFailed):
    """A rank left the groups while this one waited for it: its step raised, or it died."""


class _Waits:
    """Around an operation among ranks: which threads are in one. gloo and NCCL know RuntimeError only."""

    def __init__(self) -> None:
        self._threads: set[int] = set()

    def __enter__(self) -> None:
        self._threads.add(threading.get_ident())

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._threads.discard(threading.get_ident())
        if isinstance(error, RuntimeError):
            raise PeerLeft(f"another rank left: {str(error).splitlines()[0]}") from error

    def __contains__(self, thread: int) -> bool:
        return thread in self._threads


@dataclass(frozen=True, slots=True)
class _DataGroups:
    """Of what the ranks exchange within a step. They are given up with a step that raises, and made anew."""

    tp: dist.ProcessGroup  # the ranks of this rank's stage
    stages: dist.ProcessGroup  # all; activations
    tokens: dist.ProcessGroup  # all; gloo


class Arriving:
    """A tensor on its way to this rank. Any number of threads may wait for it."""

    def __init__(self, tensor: Tensor, work: dist.Work | None, waits: _Waits) -> None:
        self._tensor = tensor
        self._work = work
        self._waits = waits
        self._lock = threading.Lock()  # gloo wakes one of those that wait

    def get(self) -> Tensor:
        """Wait for it. Raises PeerLeft."""
        with self._waits, self._lock:
            if self._work is not None:
                self._work.wait()
                self._work = None
            return self._tensor


class ParallelGroups:
    """Collectives among the ranks of one worker. With one rank, none of them communicates.

    Tensors travel over NCCL on CUDA and gloo on CPU; plans, tokens and counters always travel over gloo. Operations
    within a step raise PeerLeft when a rank that they wait for leaves.
    """

    def __init__(self, shard: Shard, device: torch.device) -> None:
        self.shard = shard
        self.device = device
        self._control: dist.ProcessGroup | None = None
        self._data: _DataGroups | None = None
        self._data_lock = threading.Lock()
        self._waits = _Waits()
        self._sends: deque[tuple[dist.Work, Tensor]] = deque()

    @classmethod
    def connect(cls, shard: Shard, device: torch.device, init_method: str, interface: str) -> ParallelGroups:
        """Join the ranks of a worker; every rank calls it with the same init_method (tcp:// or file://).

        interface: network interface for gloo, which takes its name from the environment only; "" leaves it alone.
        """
        groups = cls(shard, device)
        world = groups.world_size
        if world == 1:
            return groups
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface  # noqa: TID251
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=init_method, rank=shard.rank, world_size=world, timeout=_FOREVER)
        groups._control = dist.new_group(list(range(world)), timeout=_FOREVER, backend="gloo")
        groups.rejoin()
        return groups

    @property
    def world_size(self) -> int:
        """Ranks of the worker."""
        return self.shard.tp * self.shard.pp

    def is_waiting(self, thread: int) -> bool:
        """Whether a thread of this process, by its identifier, is in an operation with other ranks."""
        return thread in self._waits

    def name_of(self, rank: int) -> str:
        """What messages call a rank."""
        return rank_name(rank, self.shard.tp, self.shard.pp)

    @property
    def can_rejoin(self) -> bool:
        """Whether the ranks can go on after a step that raised on one of them. With NCCL they cannot: those that wait
        for it do so on their devices."""
        return self.world_size == 1 or self.device.type != "cuda"

    # ---- the groups' life
    def rejoin(self) -> None:
        """Make the groups of a step's data; on all ranks at once, at the start and after leave()."""
        tp, everybody = self.shard.tp, list(range(self.world_size))
        own: dist.ProcessGroup | None = None
        for stage in range(self.shard.pp):  # every rank takes part in making every group
            group = dist.new_group(list(range(stage * tp, (stage + 1) * tp)), timeout=_FOREVER)
            own = group if stage == self.shard.stage else own
        stages = dist.new_group(everybody, timeout=_FOREVER)
        tokens = dist.new_group(everybody, timeout=_FOREVER, backend="gloo")
        assert own is not None
        with self._data_lock:
            self._data = _DataGroups(own, stages, tokens)

    def leave(self) -> None:
        """Give up the step in progress: whoever waits for this rank gets an error, and so leaves too. Harmless when
        repeated; any thread. Closed sockets say so: gloo has no other way to end the wait of a peer."""
        with self._data_lock:
            data, self._data = self._data, None
            self._sends.clear()
        if data is not None:
            for group in (data.tp, data.stages, data.tokens):
                dist.destroy_process_group(group)

    def close(self) -> None:
        """Leave the groups for good."""
        if self._control is not None:
            dist.destroy_process_group()
            self._control = self._data = None

    @property
    def _joined(self) -> _DataGroups:
        data = self._data
        if data is None:
            raise PeerLeft("a step before this one was given up")
        return data

    # ---- among the ranks of one stage
    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the tensor-parallel ranks, in place."""
        if self.shard.tp > 1:
            with self._waits:
                dist.all_reduce(x, group=self._joined.tp)
        return x

    def sum_in_rank_order(self, x: Tensor) -> Tensor:
        """Sum over the tensor-parallel ranks, as a new tensor: rank 0's first, whatever the size of x."""
        if self.shard.tp == 1:
            return x
        parts = self.all_gather(x)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def all_gather(self, x: Tensor) -> Tensor:
        """[tp, *x.shape]: everybody's x, in the order of the ranks."""
        if self.shard.tp == 1:
            return x[None]
        out = torch.empty((self.shard.tp * len(x), *x.shape[1:]), dtype=x.dtype, device=x.device)
        with self._waits:
            dist.all_gather_into_tensor(out, x.contiguous(), group=self._joined.tp)
        return out.view(self.shard.tp, *x.shape)

    def min_in_stage(self, counts: list[int]) -> list[int]:
        """Element-wise minimum over the tensor-parallel ranks."""
        if self.shard.tp == 1 or not counts:
            return counts
        x = torch.tensor(counts, dtype=torch.int64, device=self.device)
        with self._waits:
            dist.all_reduce(x, op=dist.ReduceOp.MIN, group=self._joined.tp)
        return x.tolist()

    # ---- from stage to stage
    def send_to_next_stage(self, x: Tensor) -> None:
        """Hand activations to the same column of the next stage, and go on; x must not change any more."""
        self._send(x.contiguous(), self.shard.rank + self.shard.tp, self._joined.stages)

    def recv_from_previous_stage(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Take activations from the same column of the stage before."""
        x = torch.empty(shape, dtype=dtype, device=self.device)
        with self._waits:
            dist.recv(x, src=self.shard.rank - self.shard.tp, group=self._joined.stages)
        return x

    def send_to_first_stage(self, x: Tensor) -> None:
        """Hand a tensor on the CPU from the last stage to the same column of the first, and go on."""
        self._send(x, self.shard.tp_rank, self._joined.tokens)

    def begin_recv_from_last_stage(self, shape: tuple[int, ...], dtype: torch.dtype) -> Arriving:
        """The other end of send_to_first_stage; in the same order."""
        x = torch.empty(shape, dtype=dtype)
        with self._waits:
            source = (self.shard.pp - 1) * self.shard.tp + self.shard.tp_rank
            return Arriving(x, dist.irecv(x, src=source, group=self._joined.tokens), self._waits)

    def _send(self, x: Tensor, to: int, group: dist.ProcessGroup) -> None:
        with self._waits:
            work = dist.isend(x, dst=to, group=group)
            assert work is not None
            self._sends.append((work, x))
            # A step has two messages at most, and the leader starts none before that many have been received.
            if len(self._sends) > 3 * (self.shard.pp + 2):
                self._sends.popleft()[0].wait()

    # ---- control, on the CPU
    def broadcast_words(self, words: Tensor | None, fixed_words: int) -> Tensor:
        """The leader's int32 words to all ranks: one message of `fixed_words`, and a second when they do not fit."""
        if self.world_size == 1:
            assert words is not None
            return words
        head = torch.zeros(fixed_words, dtype=torch.int32)
        num_inline = fixed_words - 1
        if words is not None:
            head[0] = len(words)
            head[1 : 1 + min(num_inline, len(words))] = words[:num_inline]
        dist.broadcast(head, src=0, group=self._control)
        length = int(head[0])
        if length <= num_inline:
            return head[1 : 1 + length]
        rest = torch.empty(length - num_inline, dtype=torch.int32) if words is None else words[num_inline:].contiguous()
        dist.broadcast(rest, src=0, group=self._control)
        return torch.cat((head[1:], rest))

    def min_over_ranks(self, counts: list[int]) -> list[int]:
        """Element-wise minimum over all ranks of the worker. Of the thread that broadcasts, or receives broadcasts."""
        if self.world_size == 1 or not counts:
            return counts
        x = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(x, op=dist.ReduceOp.MIN, group=self._control)
        return x.tolist()

    def exchange_texts(self, text: str) -> list[str]:
        """Everybody's text, in the order of the ranks, cut to some hundred bytes; on all ranks at once."""
        if self.world_size == 1:
            return [text]
        with self._waits:
            return self._gather_texts(text, self._joined.tokens)

    def exchange_reasons(self, text: str) -> list[str]:
        """The same, of the thread that broadcasts, or receives broadcasts."""
        return [text] if self.world_size == 1 else self._gather_texts(text, self._control)

    def _gather_texts(self, text: str, group: dist.ProcessGroup | None) -> list[str]:
        own = text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
        parts = [torch.empty(_TEXT_BYTES, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(parts, torch.frombuffer(bytearray(own), dtype=torch.uint8), group=group)
        return [bytes(part.tolist()).rstrip(b"\0").decode(errors="ignore") for part in parts]
