"""The `autoscaling` branch of the configuration. Knows nothing of pools, metrics or clusters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from settings.docs import CHOICES

MODES = ("off", "advise", "act")
POLICIES = ("slo", "queue_depth", "fixed")


def _require(holds: bool, name: str, message: str) -> None:
    if not holds:
        raise ValueError(f"{name}: {message}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalingConfig:
    """How many workers each pool should have, and who acts on it."""

    mode: str = field(default="off", metadata={CHOICES: MODES})
    """off: no plans are made. advise: plans are recorded and exported, and nothing is changed. act: they are carried
    out. The Helm chart sets advise."""
    policy: str = field(default="slo", metadata={CHOICES: POLICIES})
    """slo: the fewest GPUs for which the objectives below hold. queue_depth: requests per worker, as HPA and KEDA do.
    fixed: the pools' `replicas`."""
    interval_s: float = 10.0
    """Between two decisions."""
    max_gpus: int = 0
    """Most GPUs of all pools together, those of starting and draining workers included; 0 means the pools' greatest
    sizes together."""
    slo_ttft_ms: float = 500.0
    """Objective for the time to first token."""
    slo_ttft_quantile: float = 0.95
    """The share of requests for which it should hold."""
    slo_tpot_ms: float = 50.0
    """Objective for the mean time per output token of a request after its first."""
    slo_tpot_quantile: float = 0.95
    """The share of requests for which it should hold."""
    headroom: float = 0.1
    """Share of the time-per-output-token objective and of the KV blocks that is left free."""
    max_utilisation: float = 0.8
    """Most of a prefill worker's time that may be used: beyond it waits grow without warning."""
    down_margin: float = 0.8
    """A pool shrinks only to a size at which the expected arrivals would be this share of what it can take."""
    recovery_s: float = 30.0
    """A queue of prompts should be worked off within this time."""
    up_delay_s: float = 20.0
    """How long more workers must have been needed before a pool grows. A pool without workers grows at once."""
    down_delay_s: float = 300.0
    """How long fewer workers must have sufficed before a pool shrinks; at least as long as a worker takes to start."""
    flip_delay_s: float = 60.0
    """How long fewer workers must have sufficed before a pool gives a worker to another pool of the same shape."""
    shrink_share: float = 0.25
    """Most of a pool's workers that it loses in one decision; it may always lose one."""
    metrics_max_age_s: float = 30.0
    """Older metrics are not acted on: the pool is held."""
    warmup_s: float = 30.0
    """Steps of a worker that became ready less than this ago are not measured: it still compiles and fills caches."""
    not_reached_after_s: float = 600.0
    """A worker that has been starting for this long, and for twice its pool's usual time, counts as not to be had."""
    queue_depth_prefill: float = 2.0
    """queue_depth: requests per prefill worker, running and waiting."""
    queue_depth_decode: float = 32.0
    """queue_depth: requests per decode or mixed worker, running and waiting."""
    tolerance: float = 0.1
    """queue_depth: a pool is left as it is while the requests per worker are within this share of the target."""
    scale_to_zero: bool = False
    """Whether an idle pool may lose its last worker: only where routers may hold requests for as long as a start
    takes."""

    def __post_init__(self) -> None:
        for name, allowed in (("mode", MODES), ("policy", POLICIES)):
            value = getattr(self, name)
            _require(value in allowed, name, f"must be one of {', '.join(allowed)}, not {value!r}")
        positive = (
            *("interval_s", "slo_ttft_ms", "slo_tpot_ms", "recovery_s"),
            *("metrics_max_age_s", "queue_depth_prefill", "queue_depth_decode"),
        )
        for name in positive:
            _require(0 < getattr(self, name) < math.inf, name, f"must be positive, not {getattr(self, name)}")
        for name in ("up_delay_s", "down_delay_s", "flip_delay_s", "warmup_s", "not_reached_after_s", "max_gpus"):
            _require(0 <= getattr(self, name) < math.inf, name, f"must be >= 0, not {getattr(self, name)}")
        for name in ("slo_ttft_quantile", "slo_tpot_quantile"):
            _require(0.5 <= getattr(self, name) < 1, name, f"must be in [0.5, 1), not {getattr(self, name)}")
        for name in ("headroom", "tolerance"):
            _require(0 <= getattr(self, name) < 1, name, f"must be in [0, 1), not {getattr(self, name)}")
        _require(0 < self.max_utilisation < 1, "max_utilisation", f"must be in (0, 1), not {self.max_utilisation}")
        for name in ("down_margin", "shrink_share"):
            _require(0 < getattr(self, name) <= 1, name, f"must be in (0, 1], not {getattr(self, name)}")
