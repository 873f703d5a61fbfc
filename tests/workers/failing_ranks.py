"""Runs an engine on ranks of which one raises in a layer of a chosen step, as a kernel or an allocation may."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from tests.workers.engine_group import run_on
from tests.workers.forked_ranks import context, start_rank
from workers.config import EngineConfig
from workers.engine.adapters.ref import AdapterRef
from workers.engine.request import Request
from workers.engine.step import StepPlan
from workers.model.registry import load_config
from workers.parallel import ParallelGroups, Shard
from workers.runtime.build import make_engine, make_executor
from workers.runtime.coordination.executor import follow
from workers.runtime.runner import TorchModelRunner
from workers.sampling.params import SamplingParams


@dataclass(frozen=True)
class Fault:
    """Where a rank raises, at these steps (they count from 1)."""

    rank: int
    sequences: tuple[int, ...]
    steps: tuple[int, ...] = ()  # or at these of the steps that compute
    is_late: bool = False  # when the forward pass is through, and not before the last layer's sum over the ranks


@dataclass
class Outcome:
    """By request."""

    completions: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    failure: str = ""  # of the engine


class _FailingLayer:
    """As the layer that it stands before, but for one step."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.is_due = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def attention(self, *args: Any) -> Tensor:
        if self.is_due:
            raise MemoryError("none left for the scores")
        return self._layer.attention(*args)


class FailingRunner(TorchModelRunner):
    """Raises as its fault says."""

    fault: Fault | None = None
    num_computed = 0  # steps

    def fail_at(self, fault: Fault) -> None:
        self.fault = fault
        self._stage.layers[-1] = self._layer = _FailingLayer(self._stage.layers[-1])

    def _run_stage(self, plan: StepPlan, *args: Any) -> Tensor:
        if self.fault is None:
            return super()._run_stage(plan, *args)
        self.num_computed += 1
        is_due = plan.sequence in self.fault.sequences or self.num_computed in self.fault.steps
        self._layer.is_due = is_due and not self.fault.is_late
        out = super()._run_stage(plan, *args)
        if is_due:
            raise MemoryError("none left for the logits")
        return out


def requests(names: Sequence[str], adapters: Sequence[AdapterRef | None] = (None,)) -> list[Request]:
    """adapters: of the requests, in turns."""
    made = []
    for i, name in enumerate(names):
        prompt = [(7 * i + j) % 97 for j in range(5 + 3 * i)]
        sampling = SamplingParams(
            0.7 * (i % 2), seed=i, max_tokens=10, ignore_eos=True, frequency_penalty=0.1 * (i % 3)
        )
        adapter = adapters[i % len(adapters)]
        made.append(Request(name, prompt, len(prompt), sampling, arrival_time_s=float(i), adapter=adapter))
    return made


def _rank(
    rank: int,
    config: EngineConfig,
    url: str,
    fault: Fault | None,
    adapters: Sequence[AdapterRef | None],
    pipe: Connection,
) -> None:
    torch.set_num_threads(1)
    groups = ParallelGroups.connect(Shard.of_rank(rank, config.tp, config.pp), torch.device("cpu"), url, "lo")
    model = load_config(config.model_dir)
    runner = FailingRunner(config, model, groups, torch.device("cpu"))
    runner.warm_up()
    if fault is not None and rank == fault.rank:
        runner.fail_at(fault)
    if rank:
        follow(runner, groups)
        os._exit(0)  # as ranks end: threads of gloo may still run
    engine = make_engine(config, model, runner, make_executor(config, runner, groups), b"names", clock=lambda: 0.0)
    outcome = Outcome()
    try:
        for names in ("abcdef", "gh"):  # the second are submitted to an engine at rest
            tokens, ends = run_on(engine, requests(names, adapters))
            outcome.completions |= tokens
            outcome.reasons |= {name: end.reason.value for name, end in ends.items()}
            outcome.errors |= {name: end.error for name, end in ends.items()}
    except Exception as error:
        outcome.failure = f"{type(error).__name__}: {error}"
    engine.close()
    pipe.send(outcome)
    os._exit(0)


def run_with(config: EngineConfig, fault: Fault | None, adapters: Sequence[AdapterRef | None] = (None,)) -> Outcome:
    """Requests a to f at once, then g and h. adapters: theirs, in turns."""
    ours, theirs = context().Pipe()
    with tempfile.TemporaryDirectory() as folder:
        args = (config, f"file://{folder}/meeting", fault, adapters, theirs)
        world = config.tp * config.pp
        processes = [start_rank(_rank, rank, *args) for rank in range(world)]
        try:
            if not ours.poll(60):
                raise TimeoutError("ranks wait for one another")
            outcome: Outcome = ours.recv()
            for process in processes:
                process.join(timeout=30)
            assert [process.exitcode for process in processes] == [0] * world
            return outcome
        finally:
            for process in processes:
                process.kill()
