"""Host time of a decode step without a model: plan, encode, fill, update.

    python -m bench.host_step            # a line per size
    python -m bench.host_step --json

Streams of equal length decode one token per step. Nothing is computed: the tokens are made up. What is timed is what
the leader does in Python before and after each forward pass; on a CPU, where nothing is copied to a device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from kvstore.blocks.block_pool import BlockPool
from kvstore.blocks.block_pools import BlockPools
from workers.engine.plan_wire import decode_plan, encode_plan
from workers.engine.request import Request
from workers.engine.scheduler import Scheduler, SchedulerConfig
from workers.engine.step import ModelRunnerOutput
from workers.runtime.batching import InputBuffers
from workers.runtime.cpu_settings import prepare_cpu
from workers.sampling.params import SamplingParams

SIZES = ((32, 2048, 16), (256, 2048, 64), (256, 32000, 16), (256, 32000, 64), (512, 8000, 64))
"""(streams, tokens of each, block size)"""


@dataclass(frozen=True, slots=True)
class HostStep:
    """Medians over the steps, in milliseconds."""

    num_streams: int
    context_tokens: int
    block_size: int
    plan_ms: float
    encode_ms: float
    fill_ms: float
    update_ms: float

    @property
    def total_ms(self) -> float:
        """All four."""
        return self.plan_ms + self.encode_ms + self.fill_ms + self.update_ms


def measure(num_streams: int, context_tokens: int, block_size: int, num_steps: int = 100) -> HostStep:
    """Steps of which the first, with all prompts, is not counted."""
    blocks_per_stream = (context_tokens + num_steps) // block_size + 2
    pool = BlockPools([BlockPool(num_streams * blocks_per_stream, block_size, enable_prefix_caching=False)])
    config = SchedulerConfig(num_streams, 10**9, 10**9)
    scheduler = Scheduler(config, pool, b"f" * 16, frozenset())
    sampling = SamplingParams(max_tokens=10**6, ignore_eos=True)
    for i in range(num_streams):
        scheduler.add(Request(str(i), [5] * context_tokens, context_tokens, sampling, arrival_time_s=float(i)))
    inputs = InputBuffers(num_streams, num_streams, blocks_per_stream, torch.device("cpu"))
    tokens = ModelRunnerOutput([7] * num_streams)
    times_s: list[list[float]] = [[], [], [], []]
    for step in range(num_steps + 1):
        clock_s = [time.perf_counter()]
        plan = scheduler.schedule()
        clock_s.append(time.perf_counter())
        words = encode_plan(plan, step + 1, is_full=step == 0)
        clock_s.append(time.perf_counter())
        decoded = decode_plan(words)
        inputs.apply(decoded)
        if step > 0:
            inputs.fill(decoded, block_size)
        clock_s.append(time.perf_counter())
        scheduler.update(plan, tokens)
        clock_s.append(time.perf_counter())
        if step > 0:
            for kept, start_s, end_s in zip(times_s, clock_s, clock_s[1:], strict=False):
                kept.append(end_s - start_s)
    medians_ms = [1000 * statistics.median(kept) for kept in times_s]
    return HostStep(num_streams, context_tokens, block_size, *medians_ms)


def main(arguments: Sequence[str]) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.host_step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="a JSON line per size")
    options = parser.parse_args(arguments)
    for size in SIZES:
        row = measure(*size)
        if options.json:
            print(json.dumps({**asdict(row), "total_ms": row.total_ms}), flush=True)
        else:
            print(
                f"{row.num_streams} streams of {row.context_tokens} tokens, blocks of {row.block_size}:"
                f" plan {row.plan_ms:.3f}, encode {row.encode_ms:.3f}, fill {row.fill_ms:.3f},"
                f" update {row.update_ms:.3f}; {row.total_ms:.3f} ms",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    prepare_cpu(1)
    sys.exit(main(sys.argv[1:]))
