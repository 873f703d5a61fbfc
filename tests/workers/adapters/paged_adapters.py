"""The executor of tests.workers.paged_runner with adapters: what it chooses depends on what lies in the row's slot.

A copy of an adapter that is not in host memory fails, and so does a choice with a slot that another adapter is in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kvstore.blocks.block_pool import BlockPool
from kvstore.blocks.block_pools import BlockPools
from tests.workers.paged_runner import BLOCK_SIZE, EOS, VOCAB, PagedRunner
from workers.engine.adapters.ref import AdapterAction, AdapterLimits, AdapterOrder, AdapterRef
from workers.engine.engine import Engine
from workers.engine.scheduler import Scheduler, SchedulerConfig
from workers.engine.step import ModelRunnerOutput, SchedulerOutput, StepPlan, TransferDone


def ref(number: int) -> AdapterRef:
    return AdapterRef(f"a{number}", bytes([number + 1] * 32), f"/adapters/{number}")


class AdapterRunner(PagedRunner):
    """broken: paths that cannot be read. hanging: paths whose reads do not end."""

    def __init__(self, num_blocks: int, max_num_seqs: int, num_stages: int = 1) -> None:
        super().__init__(num_blocks, max_num_seqs, num_stages=num_stages)
        self.reading: list[AdapterOrder] = []
        self.host: set[bytes] = set()
        self.slots: dict[int, bytes] = {-1: b""}
        self.broken: set[str] = set()
        self.hanging: set[str] = set()
        self.most_in_host = 0

    def start(self, plan: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        ended = [order for order in self.reading if order.path not in self.hanging]
        self.reading = [order for order in self.reading if order.path in self.hanging]
        is_read = {order.number: order.path not in self.broken for order in ended}
        self.host |= {order.digest for order in ended if is_read[order.number]}
        self.most_in_host = max(self.most_in_host, len(self.host))
        wait = super().start(plan)
        done = [TransferDone(number, int(ok), "" if ok else "broken") for number, ok in is_read.items()]

        def wait_for_both() -> ModelRunnerOutput:
            output = wait()
            return replace(output, transfers=[*output.transfers, *done])

        return wait_for_both

    @property
    def has_ended_transfers(self) -> bool:
        return super().has_ended_transfers or any(order.path not in self.hanging for order in self.reading)

    def recover(self) -> str:
        self.reading = []
        return super().recover()

    def _run(self, plan: StepPlan, sampled: list[int]) -> None:
        if plan.is_full:
            self.host &= {order.digest for order in plan.adapter_orders if order.action is AdapterAction.KEEP}
        for order in plan.adapter_orders:
            match order.action:
                case AdapterAction.READ:
                    self.reading.append(order)
                case AdapterAction.COPY:
                    assert order.digest in self.host, "only what is in host memory is copied"
                    self.slots[order.number] = order.digest
                case AdapterAction.DROP:
                    self.host.discard(order.digest)
        super()._run(plan, sampled)

    def _choose(self, row: int, end: int) -> int:
        digest = self.slots[int(self.state.adapter_slots[row])]
        return (super()._choose(row, end) + 7 * sum(digest[:1])) % VOCAB


def make(
    limits: AdapterLimits, num_blocks: int = 40, budget: int = 8, is_async: bool = False, max_num_seqs: int = 3,
    clock: Callable[[], float] = lambda: 0.0, **options: Any,
) -> tuple[Engine, AdapterRunner]:  # fmt: skip
    runner = AdapterRunner(num_blocks, max_num_seqs, options.get("num_stages", 1))
    pools = BlockPools([BlockPool(num_blocks, BLOCK_SIZE)], (0,))
    config = SchedulerConfig(max_num_seqs, budget, num_blocks * BLOCK_SIZE, adapters=limits, **options)
    scheduler = Scheduler(config, pools, b"f" * 16, frozenset({EOS}))
    return Engine(scheduler, runner, VOCAB, clock, is_async), runner
