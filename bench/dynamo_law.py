"""The former scaling law of NVIDIA Dynamo's SLA planner, from its description (shared/research/control.md, 1.2).

    prefill = ceil(requests * ISL / interval * min(1, ttft / expected ttft) / tokens per s and GPU / GPUs)
    decode  = ceil(requests * OSL / interval / (tokens per s and GPU at ITL target / (itl / expected itl)) / GPUs)

Speeds come from profiles made beforehand: here the true cost of a step, which favours it. It acts on every interval
(180 s), without damping. For comparisons only.
"""

from __future__ import annotations

import math

from costs.step_time import StepCost
from planner.scaling.observation import PoolObservation
from planner.scaling.policies.policy import Learned, Want


class DynamoLaw:
    """A ScalingPolicy. profiles: the cost of a step by role."""

    def __init__(self, profiles: dict[str, StepCost], itl_s: float) -> None:
        self._profiles, self._itl_s = profiles, itl_s

    def want(self, pool: PoolObservation, learned: Learned) -> Want:
        """See ScalingPolicy."""
        rate = max(0.0, learned.arrivals.level) if learned.arrivals else 0.0
        count, terms = (self._prefill if pool.role == "prefill" else self._decode)(pool, rate)
        return Want(count, count, "throughput" if count else "idle", terms)

    def _prefill(self, pool: PoolObservation, rate: float) -> tuple[int, dict[str, float]]:
        tokens = pool.uncached_tokens_mean
        steps = max(1, math.ceil(tokens / pool.max_num_batched_tokens))
        expected_s = steps * self._profiles["prefill"].step_s(tokens / steps, 0, 0)
        correction = pool.ttft_mean_s / expected_s if pool.ttft_mean_s else 1.0
        count = math.ceil(rate * min(1.0, correction) * expected_s)
        return count, {"arrivals_per_s": rate, "expected_ttft_ms": expected_s * 1e3, "correction": correction}

    def _decode(self, pool: PoolObservation, rate: float) -> tuple[int, dict[str, float]]:
        context = pool.context_tokens_mean + pool.output_tokens_mean / 2
        cost = self._profiles["decode"]
        per_stream_s = cost.s_per_decode_seq + cost.s_per_context_token * context
        expected_s = cost.base_s + per_stream_s * pool.num_running / max(1, pool.num_ready)
        correction = pool.tpot_mean_s / expected_s if pool.tpot_mean_s else 1.0
        by_kv = pool.kv_blocks_per_worker * pool.block_size / max(1.0, context)
        by_itl = (self._itl_s / correction - cost.base_s) / per_stream_s
        batch = max(1.0, min(by_itl, by_kv, pool.max_num_seqs))
        tokens_per_s = batch / (cost.base_s + per_stream_s * batch)
        terms = {"arrivals_per_s": rate, "batch": batch, "correction": correction}
        return math.ceil(rate * pool.output_tokens_mean / tokens_per_s), terms
