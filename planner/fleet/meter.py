"""What a simulated fleet shows of itself: the observation that production makes from metrics."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.fleet.parts import FleetPool, FleetResult, Worker
from planner.scaling.observation import PoolObservation, StepSample
from planner.scaling.rollout import WorkerCounts
from planner.trace import TraceRequest

_RATE_WINDOW_S, _LENGTH_WINDOW_S = 30.0, 300.0  # over which arrivals are counted, and lengths averaged
_MEASURING_ERROR = 0.03  # of step times
_MOST_SAMPLES = 32  # of a pool, between two observations


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """What an observation has of demand, in all pools alike."""

    arrivals_per_s: float
    prompt_tokens: Sequence[int]
    """Of each request of the last minutes."""
    output_tokens: Sequence[int]
    """In the same order."""
    ttft_mean_s: float
    tpot_mean_s: float
    samples: Mapping[str, Sequence[StepSample]]
    """Steps by pool."""


class Meter:
    """Counts between two observations."""

    def __init__(self, pools: Mapping[str, FleetPool], seed: int) -> None:
        self._pools, self._rng = pools, random.Random(seed)
        self._recent: deque[TraceRequest] = deque()
        self._ended = 0  # requests of earlier observations
        self._samples: dict[str, list[StepSample]] = {name: [] for name in pools}

    def arrived(self, request: TraceRequest) -> None:
        """One more request."""
        self._recent.append(request)

    def stepped(self, worker: Worker, now_s: float, step_s: float, prefill: float, seqs: int, context: float) -> None:
        """A step, measured with a small error."""
        samples = self._samples[worker.pool]
        if len(samples) < _MOST_SAMPLES:
            error = 1 + self._rng.gauss(0, _MEASURING_ERROR)
            samples.append(
                StepSample(
                    duration_s=step_s * max(0.5, error),
                    num_prefill_tokens=prefill,
                    num_decode_seqs=seqs,
                    num_context_tokens=context,
                    worker_age_s=now_s - worker.ready_at_s if worker.ready_at_s else 1e6,
                )
            )

    def interval(self, now_s: float, result: FleetResult) -> Interval:
        """What came and what ended since the last call."""
        while self._recent and self._recent[0].arrival_s < now_s - _LENGTH_WINDOW_S:
            self._recent.popleft()
        window_s = min(_RATE_WINDOW_S, max(now_s, 1.0))
        arrived = sum(request.arrival_s >= now_s - window_s for request in self._recent)
        ended, self._ended = self._ended, len(result.ttft_s)
        samples, self._samples = self._samples, {name: [] for name in self._pools}
        return Interval(
            arrivals_per_s=arrived / window_s,
            prompt_tokens=[request.num_prompt_tokens for request in self._recent],
            output_tokens=[request.num_output_tokens for request in self._recent],
            ttft_mean_s=_mean(result.ttft_s[ended:]),
            tpot_mean_s=_mean(result.tpot_s[ended:]),
            samples=samples,
        )


def observe_pool(
    pool: FleetPool, workers: Sequence[Worker], queued_tokens: Sequence[int], counts: WorkerCounts, interval: Interval
) -> PoolObservation:
    """One pool. workers: those that serve in it. queued_tokens: of each request that waits for it."""
    prefill = pool.role == "prefill"
    return PoolObservation(
        name=pool.name,
        role=pool.role,
        gpus_per_worker=pool.gpus_per_worker,
        tp=pool.gpus_per_worker,
        min_workers=pool.min_workers,
        max_workers=pool.max_workers,
        configured_workers=pool.workers,
        num_ready=counts.num_ready,
        num_starting=counts.num_starting,
        num_flipping_in=counts.num_flipping_in,
        num_draining=counts.num_draining,
        startup_s=pool.startup_s,
        arrivals_per_s=interval.arrivals_per_s,
        uncached_tokens_mean=_mean(interval.prompt_tokens),
        uncached_tokens_square_mean=_mean([tokens**2 for tokens in interval.prompt_tokens]),
        context_tokens_mean=_mean(interval.prompt_tokens),
        output_tokens_mean=_mean(interval.output_tokens),
        num_waiting=len(queued_tokens),
        num_running=sum((w.prompt is not None) + len(w.streams) for w in workers),
        num_queued_tokens=float(sum(queued_tokens)) if prefill else 0.0,
        num_kv_blocks_used=sum(w.context for w in workers) / 16,
        kv_blocks_per_worker=pool.kv_tokens // 16,
        block_size=16,
        max_num_seqs=pool.max_num_seqs,
        max_num_batched_tokens=pool.max_num_batched_tokens,
        ttft_mean_s=interval.ttft_mean_s,
        tpot_mean_s=interval.tpot_mean_s,
        step_samples=tuple(interval.samples[pool.name]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
