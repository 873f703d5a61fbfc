"""Scaling policies compared in the fleet simulation: GPU-hours and the share of requests that keep to both objectives.

    make bench ARGS=scaling      or, with the public traces elsewhere: python -m bench.scaling --traces DIR

fixed has the workers that slo's formulas give for the busiest five minutes; queue_depth HPA's defaults (no delay up,
300 s down) with the configured targets; queue_tuned the targets, of 20 pairs, with which as many requests as with slo
keep to the objectives on the first run of that trace for the fewest GPU-hours, which nobody can know beforehand;
dynamo_law is in bench/dynamo_law.py. Step costs are fitted to Splitwise's measurements of Llama-2-70B on eight H100
where the traces are at hand, else round numbers near them.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.dynamo_law import DynamoLaw
from bench.rows import ROOT, Measurement, append_rows
from costs.step_time import StepCost, StepCostFit
from planner.fleet.parts import FleetPool, FleetResult
from planner.fleet.simulation import simulate
from planner.scaling.config import AutoscalingConfig
from planner.scaling.observation import PoolObservation, StepSample
from planner.scaling.policies.policy import Learned
from planner.scaling.policies.slo import SloPolicy
from planner.scaling.step_cost import measured
from planner.trace import TraceRequest, load_trace

TRACES = ROOT.parent / "shared" / "traces"
GPUS_PER_WORKER, STARTUP_S, MAX_WORKERS, KV_TOKENS = 8, 120.0, 48, 1_200_000
COSTS = {"prefill": StepCost(0.03, 1e-4, 0.0, 0.0), "decode": StepCost(0.022, 0.0, 1e-4, 4e-8)}
SEEDS = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Workload:
    """A trace, how often it is superimposed on itself, and the objectives that suit its prompts."""

    name: str
    file: str
    """Under the traces; empty: synthetic."""
    copies: int
    ttft_ms: float
    tpot_ms: float
    spread_s: float = 30.0
    """Copies are shifted by up to this much either way."""


WORKLOADS = (
    Workload("synthetic_day", "", 1, 1000, 60),
    Workload("azure_conv", "AzureLLMInferenceTrace_conv.csv.gz", 8, 1000, 60),
    Workload("azure_code", "azure2023_code_first15min.csv", 12, 2000, 60),
    Workload("mooncake_conv", "mooncake_conversation_first10min.jsonl", 4, 8000, 80),
)


def requests(workload: Workload, traces: Path, seed: int) -> list[TraceRequest]:
    """The trace as it is played."""
    rng = random.Random(seed)
    if not workload.file:
        return list(_synthetic_day(rng))
    played = [
        dataclasses.replace(r, arrival_s=max(0.0, r.arrival_s + rng.uniform(-1, 1) * workload.spread_s))
        for r in load_trace(traces / workload.file)
        for _ in range(workload.copies)
    ]
    return sorted(played, key=lambda r: r.arrival_s)


def _synthetic_day(rng: random.Random) -> Iterator[TraceRequest]:
    """Two hours that rise and fall like a day, with a jump to twice the load for five minutes."""
    now_s, length_s = 0.0, 7200.0
    while now_s < length_s:
        rate = 25 - 20 * math.cos(2 * math.pi * now_s / length_s)
        now_s += rng.expovariate(rate * (2 if 1800 <= now_s < 2100 else 1))
        yield TraceRequest(now_s, 1 + int(rng.lognormvariate(6.6, 0.9)), 2 + int(rng.lognormvariate(5.0, 0.7)))


def splitwise_costs(path: Path) -> dict[str, StepCost]:
    """Of Llama-2-70B on eight H100: prompts one at a time, and decode steps of all batches."""
    prompts, steps = [], []
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if (row["model"], row["hardware"], row["tensor_parallel"]) != ("llama2-70b", "h100-80gb", "8"):
                continue
            batch, prompt, output = (int(row[key]) for key in ("batch_size", "prompt_size", "token_size"))
            prompts.append(_sample(float(row["prompt_time"]), prefill=batch * prompt))
            context = batch * (prompt + output / 2)
            steps.append(_sample(float(row["token_time"]), seqs=batch, context=context))
    costs = {role: measured(StepCostFit(), s, 0).cost() for role, s in (("prefill", prompts), ("decode", steps))}
    return {role: cost for role, cost in costs.items() if cost is not None}


def _sample(ms: float, prefill: float = 0, seqs: float = 0, context: float = 0) -> StepSample:
    return StepSample(
        duration_s=ms / 1e3,
        num_prefill_tokens=prefill,
        num_decode_seqs=seqs,
        num_context_tokens=context,
        worker_age_s=1e6,
    )


Targets = tuple[float, float]
_TARGETS = ((0.25, 0.5, 0.75, 1.0, 2.0), (8.0, 16.0, 32.0, 48.0))  # requests per worker: prefill, decode


@dataclass(frozen=True, slots=True)
class Comparison:
    """One workload under each policy."""

    workload: Workload
    trace: Sequence[TraceRequest]
    costs: dict[str, StepCost]

    def config(self, **changes: object) -> AutoscalingConfig:
        """The defaults, with the objectives of the workload."""
        base = AutoscalingConfig(
            mode="act",
            slo_ttft_ms=self.workload.ttft_ms,
            slo_tpot_ms=self.workload.tpot_ms,
            max_gpus=2 * MAX_WORKERS * GPUS_PER_WORKER,
        )
        return dataclasses.replace(base, **changes)  # type: ignore[arg-type]

    def pools(self, prefill: int, decode: int) -> list[FleetPool]:
        """With as many workers at the start."""
        return [
            FleetPool(
                name=role,
                role=role,
                cost=self.costs[role],
                workers=count,
                max_workers=MAX_WORKERS,
                gpus_per_worker=GPUS_PER_WORKER,
                startup_s=STARTUP_S,
                kv_tokens=KV_TOKENS,
            )
            for role, count in (("prefill", prefill), ("decode", decode))
        ]

    def workers(self, start_s: float, window_s: float = 300.0) -> tuple[int, int]:
        """What the formulas give for the arrivals of a window."""
        played = [r for r in self.trace if start_s <= r.arrival_s < start_s + window_s]
        counts = []
        for role in ("prefill", "decode"):
            pool = PoolObservation(
                name=role,
                role=role,
                arrivals_per_s=len(played) / window_s,
                uncached_tokens_mean=sum(r.num_prompt_tokens for r in played) / len(played),
                uncached_tokens_square_mean=sum(r.num_prompt_tokens**2 for r in played) / len(played),
                context_tokens_mean=sum(r.num_prompt_tokens for r in played) / len(played),
                output_tokens_mean=sum(r.num_output_tokens for r in played) / len(played),
                kv_blocks_per_worker=KV_TOKENS // 16,
                max_num_seqs=128,
                max_num_batched_tokens=2048,
            )
            samples = [
                StepSample(
                    duration_s=self.costs[role].step_s(p, n, c),
                    num_prefill_tokens=p,
                    num_decode_seqs=n,
                    num_context_tokens=c,
                    worker_age_s=1e6,
                )
                for p, n, c in itertools.product((0, 500, 2000), (0, 8, 64), (0, 9_000, 70_000))
            ]
            want = SloPolicy(self.config()).want(pool, Learned(steps=measured(StepCostFit(), samples, 0)))
            counts.append(max(1, getattr(want, "least", 1)))
        return counts[0], counts[1]

    def run(self, policy: str) -> FleetResult:
        """All but the fixed one start with what the first minutes need."""
        start = self.pools(*self.workers(0.0))
        if policy == "fixed":
            peaks = [self.workers(t) for t in range(0, int(self.trace[-1].arrival_s) - 299, 150)]
            pools = self.pools(max(p for p, _ in peaks), max(d for _, d in peaks))
            return simulate(self.trace, pools, self.config(policy="fixed"))
        if policy == "dynamo_law":
            config = self.config(interval_s=180, up_delay_s=0, down_delay_s=0, flip_delay_s=0, shrink_share=1.0)
            return simulate(self.trace, start, config, DynamoLaw(self.costs, self.workload.tpot_ms / 1e3))
        if policy == "queue_depth":
            defaults = self.config()
            return self.queue_depth((defaults.queue_depth_prefill, defaults.queue_depth_decode))
        return simulate(self.trace, start, self.config(policy=policy))

    def queue_depth(self, targets: Targets) -> FleetResult:
        """With these requests per worker, and HPA's delays."""
        prefill, decode = targets
        config = self.config(policy="queue_depth", up_delay_s=0, queue_depth_prefill=prefill, queue_depth_decode=decode)
        return simulate(self.trace, self.pools(*self.workers(0.0)), config)

    def tuned_targets(self, attainment: float) -> Targets:
        """The pair of targets that does no worse for the fewest GPU-hours; else the one that comes nearest."""
        results = {targets: self.queue_depth(targets) for targets in itertools.product(*_TARGETS)}
        good = [targets for targets, result in results.items() if self.attainment(result) >= attainment]
        if good:
            return min(good, key=lambda targets: results[targets].gpu_s)
        return max(results, key=lambda targets: self.attainment(results[targets]))

    def attainment(self, result: FleetResult) -> float:
        """Share of requests within both objectives."""
        return result.attainment(self.workload.ttft_ms / 1e3, self.workload.tpot_ms / 1e3)


POLICIES = ("fixed", "queue_depth", "dynamo_law", "slo")  # queue_tuned, which needs the result of slo, comes last


def measure_scaling(traces: Path = TRACES, seeds: Sequence[int] = SEEDS) -> list[Measurement]:
    """Two rows for each workload and policy; runs are seeds. Without the traces only what needs none."""
    splitwise = traces / "splitwise_perf_model.csv"
    costs = splitwise_costs(splitwise) if splitwise.exists() else COSTS
    rows = []
    for workload in WORKLOADS:
        if workload.file and not (traces / workload.file).exists():
            continue
        compared = [Comparison(workload, requests(workload, traces, seed), costs) for seed in seeds]
        results = {
            policy: [c.run(policy) for c in compared] for policy in ("fixed", "queue_depth", "dynamo_law", "slo")
        }
        targets = compared[0].tuned_targets(compared[0].attainment(results["slo"][0]))
        results["queue_tuned"] = [c.queue_depth(targets) for c in compared]
        for policy, runs in results.items():
            setting: dict[str, object] = {
                "workload": workload.name,
                "policy": policy,
                "copies": workload.copies,
                "ttft_ms": workload.ttft_ms,
                "tpot_ms": workload.tpot_ms,
                "gpus_per_worker": GPUS_PER_WORKER,
                "startup_s": STARTUP_S,
                "reversals": max(sum(run.reversals(pool) for pool in run.counts) for run in runs),
                "flips": max(run.num_flips for run in runs),
                "step_costs": "splitwise" if splitwise.exists() else "assumed",
                **({"targets": targets} if policy == "queue_tuned" else {}),
            }
            hours = [run.gpu_s / 3600 for run in runs]
            shares = [c.attainment(run) for c, run in zip(compared, runs, strict=True)]
            rows.append(Measurement("scaling.gpu_hours", "GPU-h", hours, setting))
            rows.append(Measurement("scaling.attainment", "share", shares, setting))
    return rows


def table(rows: Sequence[Measurement]) -> str:
    """One line for each workload and policy."""
    lines = [f"{'workload':16}{'policy':14}{'GPU-hours':>10}{'attainment':>12}{'reversals':>11}{'flips':>7}"]
    for hours, share in zip(rows[::2], rows[1::2], strict=True):
        about = hours.setting
        lines.append(
            f"{about['workload']!s:16}{about['policy']!s:14}{hours.median:10.1f}{share.median:12.2%}"
            f"{about['reversals']!s:>11}{about['flips']!s:>7}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; append the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the public traces")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="runs of each workload")
    parser.add_argument("--dry-run", action="store_true", help="append no rows")
    args = parser.parse_args(arguments)
    rows = measure_scaling(args.traces, range(args.seeds))
    print(table(rows))
    if not args.dry_run:
        append_rows("cpu.jsonl", rows, "make bench ARGS=scaling")
    return 0


if __name__ == "__main__":
    sys.exit(main())
