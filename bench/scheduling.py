"""Scheduling policies, the prefill budget and preemption by swap, in virtual time: the engine that workers run, over an
executor whose steps take as long as a law says.

    python -m bench.scheduling            # a line per setting and tenant
    python -m bench.scheduling --json

Two tenants share one worker. "chat" sends short prompts at random times; "batch" sends many long prompts at once, three
times. The law is that of an assumed GPU (LAW), with noise; tiers copy a block in BLOCK_S. Each request has its tenant's
priority and deadline, which only some policies look at.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from bench.rows import Measurement
from costs.step_time import StepCost
from costs.transfer import NEVER_FETCH, TransferCost
from kvstore.blocks.block_pool import BlockPool
from kvstore.blocks.block_pools import BlockPools
from workers.config import POLICIES, SchedulingOptions
from workers.engine.engine import Engine
from workers.engine.request import Request
from workers.engine.scheduler import Scheduler, SchedulerConfig
from workers.engine.step import BlockTransfer, ModelRunnerOutput, SchedulerOutput, TransferDone
from workers.sampling.params import SamplingParams

LAW = StepCost(base_s=0.008, s_per_prefill_token=6e-5, s_per_decode_seq=2e-5, s_per_context_token=2e-8)
NOISE = 0.05  # standard deviation of the logarithm
BLOCK_SIZE, BLOCK_S = 16, 1e-4
DURATION_S = 60.0
TARGET_S = 0.025


@dataclass(frozen=True, slots=True)
class Setting:
    """What is compared."""

    name: str
    options: SchedulingOptions
    num_blocks: int = 12_000
    swaps: bool = False


@dataclass(frozen=True, slots=True)
class Tenant:
    """What its requests are like: least and most tokens, and what policies may look at."""

    name: str
    prompt: tuple[int, int]
    output: tuple[int, int]
    priority: int
    deadline_s: float  # after arrival

    def request(self, chance: random.Random, at_s: float) -> Request:
        """One that comes then."""
        length = chance.randint(*self.prompt)
        sampling = SamplingParams(max_tokens=chance.randint(*self.output), ignore_eos=True)
        request = Request(f"{self.name}-{at_s}", chance.choices(range(1000), k=length), length, sampling)
        request.tenant, request.priority = self.name.encode(), self.priority
        request.arrival_time_s, request.deadline_s = at_s, at_s + self.deadline_s
        return request


CHAT = Tenant("chat", (100, 1500), (50, 300), -10, 5.0)
BATCH = Tenant("batch", (2000, 6000), (100, 400), 10, 60.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one tenant under one setting."""

    setting: str
    tenant: str
    num_requests: int
    ttft_p50_s: float
    ttft_p95_s: float
    tpot_p95_s: float  # of the requests' means
    gap_p95_s: float  # of all times between two tokens of a stream
    last_end_s: float
    num_swaps: int  # of both tenants
    num_recomputes: int


SETTINGS = (
    *(Setting(policy, SchedulingOptions(policy=policy)) for policy in POLICIES),
    Setting("fair_share, tpot_target", SchedulingOptions(policy="fair_share", tpot_target_s=TARGET_S)),
    Setting("fcfs, few blocks", SchedulingOptions(), 2_500),
    Setting("fcfs, few blocks, swap", SchedulingOptions(), 2_500, swaps=True),
)


class VirtualExecutor:
    """Chooses token 7, takes as long as LAW, and moves blocks one transfer after the other beside it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._chance = random.Random(1)
        self._moving: list[tuple[float, int, int]] = []  # end, transfer, blocks
        self._moved_s = 0.0

    def start(self, plan: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        """One step; its end is when it is asked for."""
        ended = []
        while self.has_ended_transfers:
            _, transfer_id, num_blocks = heapq.heappop(self._moving)
            ended.append(TransferDone(transfer_id, num_blocks))
        for transfer in (*plan.loads, *plan.stores):
            self._move(transfer)

        def result() -> ModelRunnerOutput:
            if plan.requests:
                work = plan.work()
                step_s = LAW.step_s(work.num_prefill_tokens, work.num_decode_seqs, work.num_context_tokens)
                self.now_s += step_s * self._chance.lognormvariate(0, NOISE)
            return ModelRunnerOutput([7] * sum(plan.num_logits), transfers=ended)

        return result

    @property
    def has_ended_transfers(self) -> bool:
        """Whether a step would report some."""
        return bool(self._moving) and self._moving[0][0] <= self.now_s

    def wait(self, until_s: float) -> None:
        """Nothing to do before then, or before a transfer ends."""
        ends = [end_s for end_s, _, _ in self._moving[:1]]
        self.now_s = max(self.now_s, min([until_s, *ends]))

    def resend(self) -> None:
        """There is one rank."""

    def recover(self) -> str:
        """No step fails here."""
        return ""

    def stop(self) -> None:
        """Nothing runs."""

    def _move(self, transfer: BlockTransfer) -> None:
        self._moved_s = max(self._moved_s, self.now_s) + BLOCK_S * len(transfer.block_ids)
        heapq.heappush(self._moving, (self._moved_s, transfer.transfer_id, len(transfer.block_ids)))


def requests(duration_s: float) -> list[Request]:
    """Of both tenants, in order of arrival."""
    chance, made, at_s = random.Random(2), list[Request](), 0.0
    while (at_s := at_s + chance.expovariate(4.0)) < duration_s:
        made.append(CHAT.request(chance, at_s))
    for share in (1 / 12, 1 / 3, 7 / 12):
        made += [BATCH.request(chance, share * duration_s + i * 1e-3) for i in range(round(duration_s))]
    return sorted(made, key=lambda request: request.order)


def measure(setting: Setting, duration_s: float = DURATION_S) -> list[Outcome]:
    """Both tenants under one setting. Deadlines order requests, but nobody is given up."""
    executor = VirtualExecutor()
    cost = TransferCost(LAW.s_per_prefill_token, 1e-3, BLOCK_S) if setting.swaps else NEVER_FETCH
    config = SchedulerConfig(
        128, 2048, 32_000, writes_back=setting.swaps, transfer_cost=cost, scheduling=setting.options
    )
    pools = BlockPools([BlockPool(setting.num_blocks, BLOCK_SIZE)])
    engine = Engine(Scheduler(config, pools, b"f" * 16, frozenset()), executor, 1000, lambda: executor.now_s)
    coming = requests(duration_s)[::-1]
    all_requests, times = list(coming), {request.request_id: list[float]() for request in coming}
    while coming or engine.scheduler.requests:
        while coming and coming[-1].arrival_time_s <= executor.now_s:
            engine.submit(coming.pop())
        events = engine.step()
        if events is None:
            executor.wait(coming[-1].arrival_time_s if coming else float("inf"))
            continue
        for request in events.tokens.requests:
            times[request.request_id].append(executor.now_s)
    return [_outcome(setting, tenant.name, all_requests, times, engine) for tenant in (CHAT, BATCH)]


def measure_scheduling() -> list[Measurement]:
    """Rows for `make bench`."""
    rows = []
    for setting in SETTINGS:
        for outcome in measure(setting):
            about: dict[str, object] = {"setting": setting.name, "tenant": outcome.tenant}
            about |= {"num_swaps": outcome.num_swaps, "num_recomputes": outcome.num_recomputes}
            for name in ("ttft_p95_s", "gap_p95_s", "last_end_s"):
                rows.append(Measurement(f"scheduling.{name.removesuffix('_s')}", "s", [getattr(outcome, name)], about))
    return rows


def _outcome(
    setting: Setting, tenant: str, made: Sequence[Request], times: dict[str, list[float]], engine: Engine
) -> Outcome:
    mine = [request for request in made if request.tenant == tenant.encode()]
    ttft_s = [times[request.request_id][0] - request.arrival_time_s for request in mine]
    gaps = [np.diff(times[request.request_id]) for request in mine]
    preemption = engine.scheduler.preemption
    return Outcome(
        setting.name,
        tenant,
        len(mine),
        float(np.quantile(ttft_s, 0.5)),
        float(np.quantile(ttft_s, 0.95)),
        float(np.quantile([np.mean(gap) for gap in gaps], 0.95)),
        float(np.quantile(np.concatenate(gaps), 0.95)),
        max(times[request.request_id][-1] for request in mine),
        preemption.num_swaps,
        preemption.num_recomputes,
    )


def main(arguments: Sequence[str]) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.scheduling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="a JSON line per setting and tenant")
    options = parser.parse_args(arguments)
    for setting in SETTINGS:
        for outcome in measure(setting):
            if options.json:
                print(json.dumps(asdict(outcome)), flush=True)
                continue
            print(
                f"{outcome.setting}: {outcome.tenant}: ttft {outcome.ttft_p50_s:.2f} / {outcome.ttft_p95_s:.2f} s,"
                f" tpot {1000 * outcome.tpot_p95_s:.1f} ms, gap {1000 * outcome.gap_p95_s:.1f} ms,"
                f" over at {outcome.last_end_s:.1f} s; {outcome.num_swaps} swaps, {outcome.num_recomputes} recomputes",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
