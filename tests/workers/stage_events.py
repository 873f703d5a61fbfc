"""Runs an engine on pipeline stages whose begins and ends are noted, and which wait for one another.

Stage s that computes plan k stays in it until each stage j has begun plan k + s - j: all of them meet if the engine
keeps them at work, and else the wait runs out.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized, SynchronizedArray
from typing import Any

import torch
from torch import Tensor

from tests.workers.forked_ranks import context, start_rank
from workers.config import EngineConfig
from workers.engine.request import Request
from workers.engine.step import StepPlan
from workers.model.registry import load_config
from workers.parallel import ParallelGroups, Shard
from workers.runtime.build import make_engine
from workers.runtime.coordination.executor import GroupExecutor, follow
from workers.runtime.runner import TorchModelRunner
from workers.sampling.params import SamplingParams

MAX_PLANS = 400
_WAIT_S = 10.0
_LOOK_S = 0.0002


@dataclass
class StageEvents:
    """Shared by the stages' processes: at which tick of one counter a stage began or ended a plan; 0: not yet."""

    num_stages: int
    ticks: Synchronized[int]
    begins: SynchronizedArray[int]
    ends: SynchronizedArray[int]
    has_missed: Synchronized[int]  # a wait ran out: the stages wait no more

    @staticmethod
    def make(num_stages: int) -> StageEvents:
        shared = context()
        columns = [shared.Array("q", num_stages * MAX_PLANS) for _ in range(2)]
        return StageEvents(num_stages, shared.Value("q", 0), *columns, shared.Value("q", 0))

    def note(self, kind: str, stage: int, sequence: int) -> None:
        with self.ticks.get_lock():
            self.ticks.value += 1
            getattr(self, kind)[stage * MAX_PLANS + sequence] = self.ticks.value

    def begin(self, stage: int, sequence: int) -> int:
        return self.begins[stage * MAX_PLANS + sequence]

    def end(self, stage: int, sequence: int) -> int:
        return self.ends[stage * MAX_PLANS + sequence]

    def meet(self, stage: int, sequence: int) -> None:
        """Wait for all stages."""
        others = [(other, sequence + stage - other) for other in range(self.num_stages)]
        give_up_s = time.monotonic() + _WAIT_S
        while not all(self.begin(other, plan) for other, plan in others) and not self.has_missed.value:
            if time.monotonic() > give_up_s:
                self.has_missed.value = 1
            time.sleep(_LOOK_S)


class MeetingRunner(TorchModelRunner):
    """Its stage meets the others in plans first .. last."""

    events: StageEvents
    first, last = 0, 0

    def _run_stage(self, plan: StepPlan, *args: Any) -> Tensor:
        if not self.last:
            return super()._run_stage(plan, *args)
        stage = self._groups.shard.stage
        self.events.note("begins", stage, plan.sequence)
        out = super()._run_stage(plan, *args)
        if self.first <= plan.sequence <= self.last:
            self.events.meet(stage, plan.sequence)
        self.events.note("ends", stage, plan.sequence)
        return out


def _rank(rank: int, config: EngineConfig, url: str, events: StageEvents, steady: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    groups = ParallelGroups.connect(Shard.of_rank(rank, config.tp, config.pp), torch.device("cpu"), url, "lo")
    model = load_config(config.model_dir)
    runner = MeetingRunner(config, model, groups, torch.device("cpu"))
    runner.warm_up()
    runner.events, (runner.first, runner.last) = events, steady
    if rank:
        follow(runner, groups)
        groups.close()
        return
    engine = make_engine(config, model, runner, GroupExecutor(runner, groups, 1), b"names", clock=lambda: 0.0)
    for i in range(5):
        sampling = SamplingParams(max_tokens=40, ignore_eos=True)
        engine.submit(Request(f"r{i}", list(range(3 + i, 60 + i)), 57, sampling, arrival_time_s=float(i)))
    while engine.step() is not None:
        pass
    engine.close()
    groups.close()


def run_stages(config: EngineConfig, steady: tuple[int, int]) -> StageEvents:
    """Five requests to their ends."""
    events = StageEvents.make(config.pp)
    with tempfile.TemporaryDirectory() as folder:
        args = (config, f"file://{folder}/meeting", events, steady)
        processes = [start_rank(_rank, rank, *args) for rank in range(config.pp)]
        for process in processes:
            process.join(timeout=120)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
    assert codes == [0] * config.pp
    return events
