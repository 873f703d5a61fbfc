"""Requests per worker, as HPA and KEDA scale on vllm:num_requests_waiting and vllm:num_requests_running.

count = ceil(requests / target); within the tolerance the pool is left as it is (Kubernetes documentation, "Horizontal
Pod Autoscaling", algorithm details). Knows nothing of time: the target stands for the objectives.
"""

from __future__ import annotations

import math

from planner.scaling.config import AutoscalingConfig
from planner.scaling.observation import PoolObservation
from planner.scaling.policies.policy import Learned, Want


class QueueDepthPolicy:
    """One target for prefill, one for workers that decode."""

    def __init__(self, config: AutoscalingConfig) -> None:
        self._config = config

    def want(self, pool: PoolObservation, learned: Learned) -> Want:
        """See ScalingPolicy."""
        config, requests = self._config, pool.num_waiting + pool.num_running
        target = config.queue_depth_prefill if pool.role == "prefill" else config.queue_depth_decode
        count = math.ceil(requests / target)
        per_worker = requests / max(1, pool.num_workers)
        if pool.num_workers and abs(per_worker / target - 1) <= config.tolerance:
            count = pool.num_workers
        terms = {"requests": float(requests), "requests_per_worker": per_worker, "target_per_worker": target}
        return Want(count, count, "queue_depth" if count else "idle", terms)
