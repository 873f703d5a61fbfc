"""Where a decode step's time goes on the engine alone, in a process of its own: one stream, as in the cluster.

    python -m bench.peers.step_profile MODEL_DIR --dtype bfloat16 --threads 2   # prints one JSON object

Whole steps are timed, and the part of them that the model runner takes. Sampling is timed on its own, on logits of the
same size. The rest of the runner's part is the model, its inputs included; the rest of the step is scheduling: to plan,
to encode, to decode, to update.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.peers.ours import OurOptions
from bench.peers.workload import Call, step_call
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.request import Request
from workers.engine.step import ModelRunner, ModelRunnerOutput, StepPlan, TransferDone
from workers.model.registry import load_config
from workers.parallel import ParallelGroups, Shard
from workers.runtime.build import load_runner, make_engine
from workers.runtime.coordination.executor import GroupExecutor
from workers.runtime.cpu_settings import prepare_cpu
from workers.runtime.runner import pick_device, pick_dtype
from workers.sampling.params import SamplingParams, SamplingRows
from workers.sampling.sampler import sample

_SAMPLINGS = 50
_TOP_OPERATIONS = 4


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Medians over the steps, in milliseconds, but for the last."""

    step_ms: float
    model_ms: float
    sampling_ms: float
    scheduling_ms: float
    operation_shares: dict[str, float]  # of the CPU time in torch's operations; the largest ones


@dataclass(slots=True)
class TimedRunner:
    """A model runner whose time from a plan to its tokens is kept."""

    inner: ModelRunner
    took_s: list[float] = field(default_factory=list)

    def poll(self, transfer_ids: Sequence[int]) -> Sequence[TransferDone]:
        """As in ModelRunner."""
        return self.inner.poll(transfer_ids)

    def recover(self) -> None:
        """As in ModelRunner."""
        self.inner.recover()

    def start(self, plan: StepPlan, ended: Sequence[TransferDone] = ()) -> Callable[[], ModelRunnerOutput]:
        """As in ModelRunner."""
        began_s = time.perf_counter()
        wait = self.inner.start(plan, ended)

        def timed_wait() -> ModelRunnerOutput:
            output = wait()
            self.took_s.append(time.perf_counter() - began_s)
            return output

        return timed_wait

    def ended_transfers(self) -> Sequence[int]:
        """As in ModelRunner."""
        return self.inner.ended_transfers()


def _decode(engine: Engine, name: str, call: Call) -> list[float]:
    """Seconds of each step."""
    (prompt,) = call.prompts
    sampling = SamplingParams(max_tokens=call.max_tokens, ignore_eos=True)
    engine.submit(Request(name, list(prompt), len(prompt), sampling))
    steps_s: list[float] = []
    while True:
        began_s = time.perf_counter()
        if engine.step() is None:
            return steps_s
        steps_s.append(time.perf_counter() - began_s)


def _sampling_s(vocab_size: int, dtype: torch.dtype, groups: ParallelGroups) -> float:
    logits, rows = torch.randn(1, vocab_size).to(dtype), SamplingRows.greedy(1)
    positions = np.zeros(1, np.int64)
    took_s = []
    with torch.inference_mode():
        for _ in range(_SAMPLINGS):
            began_s = time.perf_counter()
            sample(logits, rows, positions, groups, vocab_size).tolist()
            took_s.append(time.perf_counter() - began_s)
    return statistics.median(took_s)


def _shares(profiled: profile) -> dict[str, float]:
    times_us = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    total_us = sum(times_us.values())
    largest = sorted(times_us, key=lambda name: -times_us[name])[:_TOP_OPERATIONS]
    return {name: round(times_us[name] / total_us, 3) for name in largest}


def measure(model_dir: str, dtype: str, num_threads: int) -> StepProfile:
    """In this process, whose number of threads it sets."""
    prepare_cpu(num_threads)
    config = EngineConfig(model_dir, dtype=dtype, device="cpu", num_threads=num_threads)
    model = load_config(model_dir)
    device = pick_device(config, 0)
    groups = ParallelGroups(Shard(), device)
    runner = load_runner(config, model, groups, device)
    runner.warm_up()
    timed = TimedRunner(runner)
    engine = make_engine(config, model, runner, GroupExecutor(timed, groups), b"bench", time.perf_counter)
    _decode(engine, "warm-up", step_call(model.vocab_size, 0))
    timed.took_s.clear()
    steps_s = _decode(engine, "timed", step_call(model.vocab_size, 1))
    step_ms, runner_ms = (1000 * statistics.median(times) for times in (steps_s, timed.took_s))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        _decode(engine, "profiled", step_call(model.vocab_size, 2))
    engine.close()
    sampling_ms = 1000 * _sampling_s(model.vocab_size, pick_dtype(config, device), groups)
    return StepProfile(step_ms, runner_ms - sampling_ms, sampling_ms, step_ms - runner_ms, _shares(profiled))


def profile_alone(model_dir: Path, options: OurOptions) -> StepProfile:
    """As measure, in a process of its own."""
    command = [sys.executable, "-P", "-m", "bench.peers.step_profile", str(model_dir)]
    command += ["--dtype", options.dtype, "--threads", str(options.num_threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return StepProfile(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model_dir")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(json.dumps(asdict(measure(options.model_dir, options.dtype, options.threads))), flush=True)


if __name__ == "__main__":
    main()
