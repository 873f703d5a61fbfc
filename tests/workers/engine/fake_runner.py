"""An engine without tensors, its requests, and running them to their ends."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.blocks.block_pool import BlockPool
from kvstore.blocks.block_pools import BlockPools
from workers.engine.engine import Engine
from workers.engine.request import FinishReason, Request, RequestRole
from workers.engine.scheduler import Scheduler, SchedulerConfig
from workers.engine.step import BlockTransfer, ModelRunnerOutput, SchedulerOutput, TransferDone
from workers.sampling.params import SamplingParams

BLOCK_SIZE = 4
VOCAB = 50
EOS = 49


class FakeRunner:
    """Every token is the same; transfers end with the step that begins them, unless they are held back."""

    def __init__(self) -> None:
        self.plans: list[SchedulerOutput] = []
        self.load_limit = 1 << 30  # blocks that verify, per load
        self.next_token = 7
        self.holds_back = False
        self.begun: list[BlockTransfer] = []

    def start(self, plan: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        self.plans.append(plan)
        self.begun += [*plan.loads, *plan.stores]
        ended = [] if self.holds_back else [self.end(transfer) for transfer in list(self.begun)]
        output = ModelRunnerOutput([self.next_token] * sum(plan.num_logits), transfers=ended)
        return lambda: output

    def end(self, transfer: BlockTransfer) -> TransferDone:
        self.begun.remove(transfer)
        is_load = any(transfer in plan.loads for plan in self.plans)
        return TransferDone(transfer.transfer_id, min(self.load_limit if is_load else 1 << 30, len(transfer.block_ids)))

    @property
    def has_ended_transfers(self) -> bool:
        return bool(self.begun) and not self.holds_back

    def resend(self) -> None: ...

    def stop(self) -> None:
        self.plans.append(SchedulerOutput())


def make_engine(num_blocks=16, max_num_seqs=4, budget=8, context=48, **options) -> tuple[Engine, FakeRunner]:
    runner = FakeRunner()
    config = SchedulerConfig(max_num_seqs, budget, context, **options)
    pools = BlockPools([BlockPool(num_blocks, BLOCK_SIZE)])
    scheduler = Scheduler(config, pools, b"f" * 16, frozenset({EOS}))
    return Engine(scheduler, runner, VOCAB, clock=lambda: 0.0), runner


def make_request(
    name: str, length: int, max_tokens=4, role=RequestRole.MIXED, arrival=0.0, start=0, **options
) -> Request:
    token_ids = [(start + i) % 40 for i in range(length)]
    sampling = SamplingParams(max_tokens=max_tokens, **options)
    return Request(name, token_ids, length, sampling, role=role, arrival_time_s=arrival)


def finish_all(engine: Engine) -> dict[str, FinishReason]:
    ends: dict[str, FinishReason] = {}
    for _ in range(1000):
        events = engine.step()
        if events is None:
            return ends
        ends.update({e.request_id: e.reason for e in events.ended})
    raise AssertionError("the engine did not come to rest")
