"""As many workers as the pool's `replicas` say."""

from __future__ import annotations

from planner.scaling.config import AutoscalingConfig
from planner.scaling.observation import PoolObservation
from planner.scaling.policies.policy import Learned, Want


class FixedPolicy:
    """Asks for the configured number again whenever something else has changed it."""

    def __init__(self, config: AutoscalingConfig) -> None:
        del config

    def want(self, pool: PoolObservation, learned: Learned) -> Want:
        """See ScalingPolicy."""
        count = pool.configured_workers
        return Want(count, count, "replicas", {"replicas": float(count)})
