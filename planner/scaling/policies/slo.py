"""The fewest workers for which the quantiles of TTFT and TPOT hold, for the arrivals that are expected when they start.

The formulas are in planner.scaling.capacity, with step costs fitted to measured steps.
"""

from __future__ import annotations

from planner.scaling.capacity import Objectives, workers_for
from planner.scaling.config import AutoscalingConfig
from planner.scaling.observation import PoolObservation
from planner.scaling.policies.policy import Hold, Learned, Want

_FORECAST_QUANTILE = 0.9  # of the level of arrivals: that they are Poisson around it is in the queueing formulas


class SloPolicy:
    """A pool grows when it would miss an objective, and shrinks when fewer workers would do for more arrivals still.

    The margin is in arrivals, not in the objectives: where a step takes most of its time for the weights, a batch for
    80 % of the time has half the streams.
    """

    def __init__(self, config: AutoscalingConfig) -> None:
        self._config = config

    def want(self, pool: PoolObservation, learned: Learned) -> Want | Hold:
        """See ScalingPolicy."""
        if pool.is_idle:
            return Want(0, 0, "idle", {"arrivals_per_s": 0.0})
        cost = learned.steps.cost()
        if cost is None:
            return Hold(f"step costs are not measured yet: {learned.steps.num_samples} samples")
        horizon_s = pool.startup_s + self._config.interval_s
        ahead = learned.arrivals.ahead(horizon_s, _FORECAST_QUANTILE) if learned.arrivals else 0.0
        arrivals = max(pool.arrivals_per_s, ahead)
        least = workers_for(pool, arrivals, cost, self._objectives())
        enough = workers_for(pool, arrivals / self._config.down_margin, cost, self._objectives())
        terms = least.terms | {
            "arrivals_now_per_s": pool.arrivals_per_s,
            "arrivals_ahead_per_s": ahead,
            "horizon_ms": horizon_s * 1e3,
            "measured_ttft_mean_ms": pool.ttft_mean_s * 1e3,
            "measured_tpot_mean_ms": pool.tpot_mean_s * 1e3,
        }
        above = max(least.num_workers, enough.num_workers)
        return Want(least.num_workers, above, least.binding, terms, least.unreachable)

    def _objectives(self) -> Objectives:
        config = self._config
        return Objectives(
            ttft_s=config.slo_ttft_ms / 1e3,
            ttft_quantile=config.slo_ttft_quantile,
            tpot_s=config.slo_tpot_ms / 1e3,
            tpot_quantile=config.slo_tpot_quantile,
            headroom=config.headroom,
            max_utilisation=config.max_utilisation,
            recovery_s=config.recovery_s,
        )
