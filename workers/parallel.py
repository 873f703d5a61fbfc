"""How a model is cut into tensor- and pipeline-parallel shards, and the process groups that join them.

Rank r is stage r // tp, column r % tp. Layers of the stages are as even as can be, earlier stages take the rest.
Knows nothing of models or requests.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# A rank waits for the next plan as long as the leader has none. A dead peer closes its sockets, which ends the wait.
_FOREVER = timedelta(days=365)


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


class ParallelGroups:
    """Collectives among the ranks of one worker. With one rank, none of them communicates.

    Tensors travel over NCCL on CUDA and gloo on CPU; plans and counters always travel over gloo.
    """

    def __init__(self, shard: Shard, device: torch.device) -> None:
        self.shard = shard
        self.device = device
        self._tp: dist.ProcessGroup | None = None
        self._control: dist.ProcessGroup | None = None

    @classmethod
    def connect(cls, shard: Shard, device: torch.device, init_method: str, interface: str) -> ParallelGroups:
        """Join the ranks of a worker; every rank calls it with the same init_method (tcp:// or file://).

        interface: network interface for gloo, which takes its name from the environment only; "" leaves it alone.
        """
        groups = cls(shard, device)
        world = shard.tp * shard.pp
        if world == 1:
            return groups
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface  # noqa: TID251
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=init_method, rank=shard.rank, world_size=world, timeout=_FOREVER)
        groups._control = dist.new_group(list(range(world)), timeout=_FOREVER, backend="gloo")
        for stage in range(shard.pp):  # every rank takes part in making every group
            members = list(range(stage * shard.tp, (stage + 1) * shard.tp))
            group = dist.new_group(members, timeout=_FOREVER)
            if stage == shard.stage:
                groups._tp = group
        return groups

    @property
    def world_size(self) -> int:
        """Ranks of the worker."""
        return self.shard.tp * self.shard.pp

    def close(self) -> None:
        """Leave the groups."""
        if self._control is not None:
            dist.destroy_process_group()
            self._control = self._tp = None

    # ---- among the ranks of one stage
    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the tensor-parallel ranks, in place."""
        if self.shard.tp > 1:
            dist.all_reduce(x, group=self._tp)
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
        dist.all_gather_into_tensor(out, x.contiguous(), group=self._tp)
        return out.view(self.shard.tp, *x.shape)

    # ---- from stage to stage
    def send_to_next_stage(self, x: Tensor) -> None:
        """Hand activations to the same column of the next stage."""
        dist.send(x.contiguous(), dst=self.shard.rank + self.shard.tp)

    def recv_from_previous_stage(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Take activations from the same column of the stage before."""
        x = torch.empty(shape, dtype=dtype, device=self.device)
        dist.recv(x, src=self.shard.rank - self.shard.tp)
        return x

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
        """Element-wise minimum over all ranks of the worker."""
        if self.world_size == 1 or not counts:
            return counts
        x = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(x, op=dist.ReduceOp.MIN, group=self._control)
        return x.tolist()

    def numbers_to_leader(self, numbers: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
        """As tokens_to_leader, for fp64 numbers of a shape that both ends know."""
        return self._to_leader(numbers, shape, torch.float64)

    def tokens_to_leader(self, token_ids: Tensor | None, count: int) -> Tensor | None:
        """Sampled ids [count] from the last stage's first rank to the leader; other ranks get None."""
        return self._to_leader(token_ids, (count,), torch.int64)

    def _to_leader(self, values: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        source = (self.shard.pp - 1) * self.shard.tp
        if self.shard.pp == 1 or not shape[0]:
            return values
        if self.shard.rank == source:
            assert values is not None
            dist.send(values.to("cpu", dtype), dst=0, group=self._control)
        elif self.shard.rank == 0:
            received = torch.empty(shape, dtype=dtype)
            dist.recv(received, src=source, group=self._control)
            return received
        return None
