"""Where a decode step's time goes on the engine alone, in a process of its own: one stream, as in the cluster.

    echo 0 | python -m bench.peers.step_profile MODEL_DIR --dtype bfloat16 --threads 2

It says "ready" when the engine is loaded. Each line of stdin then is the seed of a turn, and is answered by one JSON
object: the cluster has its turns in between, so that both see the same machine. Whole steps are timed, and the part of
them that the model runner takes. Sampling is timed on its own, on logits of the same size. The rest of the runner's
part is the model, its inputs included; the rest of the step is scheduling: to plan, to encode, to decode, to update.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.peers.ours import OurOptions
from bench.peers.workload import Call, prompt_call, step_call
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
    """Milliseconds, but for the last; medians over the steps, but for the mean."""

    ttft_ms: float  # of one prompt, as in prompt_call
    mean_step_ms: float  # but for the first one, which reads the prompt
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


class EngineAlone:
    """A loaded engine without a cluster. In this process, whose number of threads it sets."""

    def __init__(self, model_dir: str, dtype: str, num_threads: int) -> None:
        prepare_cpu(num_threads)
        config = EngineConfig(model_dir, dtype=dtype, device="cpu", num_threads=num_threads)
        model = load_config(model_dir)
        device = pick_device(config, 0)
        groups = ParallelGroups(Shard(), device)
        runner = load_runner(config, model, groups, device)
        runner.warm_up()
        self._vocab_size = model.vocab_size
        self._runner = TimedRunner(runner)
        self._engine = make_engine(
            config, model, runner, GroupExecutor(self._runner, groups), b"bench", time.perf_counter
        )
        _decode(self._engine, "warm-up", step_call(model.vocab_size, -1))
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            _decode(self._engine, "profiled", step_call(model.vocab_size, -2))
        self._shares = _shares(profiled)
        self._time_sampling = partial(_sampling_s, model.vocab_size, pick_dtype(config, device), groups)

    def measure(self, seed: int) -> StepProfile:
        """One turn. A seed gives the same prompts as the cluster's; no two turns may have one."""
        ttft_ms = 1000 * sum(_decode(self._engine, f"prompt {seed}", prompt_call(self._vocab_size, seed)))
        self._runner.took_s.clear()
        steps_s = _decode(self._engine, f"steps {seed}", step_call(self._vocab_size, seed))
        step_ms, runner_ms = (1000 * statistics.median(times) for times in (steps_s, self._runner.took_s))
        sampling_ms = 1000 * self._time_sampling()
        return StepProfile(
            ttft_ms,
            1000 * statistics.fmean(steps_s[1:]),
            step_ms,
            runner_ms - sampling_ms,
            sampling_ms,
            step_ms - runner_ms,
            self._shares,
        )

    def close(self) -> None:
        """Nothing is running."""
        self._engine.close()


@contextmanager
def engine_alone(model_dir: Path, options: OurOptions) -> Iterator[Callable[[int], StepProfile]]:
    """EngineAlone.measure of an engine that is loaded in a process of its own, and sleeps between its turns. Raises
    RuntimeError when the process ends."""
    command = [sys.executable, "-P", "-m", "bench.peers.step_profile", str(model_dir)]
    command += ["--dtype", options.dtype, "--threads", str(options.num_threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def answer() -> Any:
            """The next JSON object or text; libraries may print other lines."""
            for line in answers:
                with suppress(ValueError):
                    return json.loads(line)
            raise RuntimeError(f"{shlex.join(command)} has ended")

        def measure(seed: int) -> StepProfile:
            print(seed, file=questions, flush=True)
            return StepProfile(**answer())

        try:
            answer()
            yield measure
        finally:
            with suppress(BrokenPipeError):
                questions.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model_dir")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    engine = EngineAlone(options.model_dir, options.dtype, options.threads)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(engine.measure(int(line)))), flush=True)
    engine.close()


if __name__ == "__main__":
    main()
