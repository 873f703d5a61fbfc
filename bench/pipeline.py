"""Tokens per second of a worker with pipeline stages on this machine's CPU, one thread for each stage.

    python -m bench.pipeline --stages 2

A small model on random weights; each stage is a process. All requests are there from the start: the time is from the
first step to the last token, the prefill of their prompts included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection

import torch

from bench.engine import RandomWeights, Sizes
from workers.config import EngineConfig
from workers.engine.request import Request
from workers.parallel import ParallelGroups, Shard
from workers.runtime.build import make_engine, make_executor
from workers.runtime.coordination.executor import follow
from workers.runtime.cpu_settings import prepare_cpu
from workers.runtime.runner import TorchModelRunner
from workers.sampling.params import SamplingParams

SIZES = Sizes(512, 1536, 8, 8, 4, 8192, 2048)
WORKLOADS = {"decode": (8, 48), "mixed": (192, 24), "prefill": (512, 1)}  # tokens of each prompt and completion


def _config(stages: int, is_async: bool, requests: int) -> EngineConfig:
    return EngineConfig(
        "",
        dtype="float32",
        device="cpu",
        pp=stages,
        block_size=16,
        num_blocks=requests * 36 + 8,
        max_num_seqs=requests,
        max_num_batched_tokens=256,
        enable_prefix_caching=False,
        async_scheduling=is_async,
    )


def _rank(rank: int, config: EngineConfig, url: str, runs: int, pipe: Connection) -> None:
    prepare_cpu(1)
    device = torch.device("cpu")
    groups = ParallelGroups.connect(Shard.of_rank(rank, 1, config.pp), device, url, "lo")
    runner = TorchModelRunner(config, SIZES.model(), groups, device, RandomWeights(torch.float32, device))
    runner.warm_up()
    if rank:
        follow(runner, groups)
        return
    engine = make_engine(config, SIZES.model(), runner, make_executor(config, runner, groups), b"bench")
    for name, (num_prompt, num_output) in WORKLOADS.items():
        rates = []
        for run in range(runs + 1):  # the first warms up
            began_s, num_tokens = time.perf_counter(), 0
            for i in range(config.max_num_seqs):
                prompt = torch.randint(8192, (num_prompt,), generator=torch.Generator().manual_seed(i)).tolist()
                sampling = SamplingParams(max_tokens=num_output, ignore_eos=True)
                engine.submit(Request(f"{run}-{i}", prompt, num_prompt, sampling, arrival_time_s=float(i)))
            while engine.step() is not None:
                pass
            num_tokens = config.max_num_seqs * (num_prompt + num_output)
            rates.append(num_tokens / (time.perf_counter() - began_s))
        pipe.send({"workload": name, "tokens_per_s": statistics.median(rates[1:]), "runs": rates[1:]})
    engine.close()


def measure(stages: int, is_async: bool, requests: int, runs: int) -> list[dict[str, object]]:
    """A row per workload; tokens of prompts and completions."""
    config = _config(stages, is_async, requests)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, config, f"file://{folder}/meeting", runs, theirs), daemon=True)
            for rank in range(stages)
        ]
        for process in processes:
            process.start()
        rows = [
            {"stages": stages, "async_scheduling": is_async, "requests": requests, **ours.recv()} for _ in WORKLOADS
        ]
        for process in processes:
            process.join(timeout=60)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--async-scheduling", action="store_true")
    options = parser.parse_args()
    for row in measure(options.stages, options.async_scheduling, options.requests, options.runs):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
