"""The `autoscaling` branch of the configuration. Knows nothing of pools, metrics or clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from settings.limits import Bounds, OneOf, check_limits

MODES = ("off", "advise", "act")
POLICIES = ("slo", "queue_depth", "fixed")


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalingConfig:
    """How many workers each pool should have, and who acts on it."""

    mode: Annotated[str, OneOf(MODES)] = "off"
    """off: no plans are made. advise: plans are recorded and exported, and nothing is changed. act: they are carried
    out. The Helm chart sets advise."""
    policy: Annotated[str, OneOf(POLICIES)] = "slo"
    """slo: the fewest GPUs for which the objectives below hold. queue_depth: requests per worker, as HPA and KEDA do.
    fixed: the pools' `replicas`."""
    interval_s: Annotated[float, Bounds(more_than=0)] = 10.0
    """Between two decisions."""
    max_gpus: Annotated[int, Bounds(at_least=0)] = 0
    """Most GPUs of all pools together, those of starting and draining workers included; 0 means the pools' greatest
    sizes together."""
    slo_ttft_ms: Annotated[float, Bounds(more_than=0)] = 500.0
    """Objective for the time to first token."""
    slo_ttft_quantile: Annotated[float, Bounds(at_least=0.5, less_than=1)] = 0.95
    """The share of requests for which it should hold."""
    slo_tpot_ms: Annotated[float, Bounds(more_than=0)] = 50.0
    """Objective for the mean time per output token of a request after its first."""
    slo_tpot_quantile: Annotated[float, Bounds(at_least=0.5, less_than=1)] = 0.95
    """The share of requests for which it should hold."""
    headroom: Annotated[float, Bounds(at_least=0, less_than=1)] = 0.1
    """Share of the time-per-output-token objective and of the KV blocks that is left free."""
    max_utilisation: Annotated[float, Bounds(more_than=0, less_than=1)] = 0.8
    """Most of a prefill worker's time that may be used: beyond it waits grow without warning."""
    down_margin: Annotated[float, Bounds(more_than=0, at_most=1)] = 0.8
    """A pool shrinks only to a size at which the expected arrivals would be this share of what it can take."""
    recovery_s: Annotated[float, Bounds(more_than=0)] = 30.0
    """A queue of prompts should be worked off within this time."""
    up_delay_s: Annotated[float, Bounds(at_least=0)] = 20.0
    """How long more workers must have been needed before a pool grows. A pool without workers grows at once."""
    down_delay_s: Annotated[float, Bounds(at_least=0)] = 300.0
    """How long fewer workers must have sufficed before a pool shrinks; at least as long as a worker takes to start."""
    flip_delay_s: Annotated[float, Bounds(at_least=0)] = 60.0
    """How long fewer workers must have sufficed before a pool gives a worker to another pool of the same shape."""
    shrink_share: Annotated[float, Bounds(more_than=0, at_most=1)] = 0.25
    """Most of a pool's workers that it loses in one decision; it may always lose one."""
    metrics_max_age_s: Annotated[float, Bounds(more_than=0)] = 30.0
    """Older metrics are not acted on: the pool is held."""
    warmup_s: Annotated[float, Bounds(at_least=0)] = 30.0
    """Steps of a worker that became ready less than this ago are not measured: it still compiles and fills caches."""
    not_reached_after_s: Annotated[float, Bounds(at_least=0)] = 600.0
    """A worker that has been starting for this long, and for twice its pool's usual time, counts as not to be had."""
    queue_depth_prefill: Annotated[float, Bounds(more_than=0)] = 2.0
    """queue_depth: requests per prefill worker, running and waiting."""
    queue_depth_decode: Annotated[float, Bounds(more_than=0)] = 32.0
    """queue_depth: requests per decode or mixed worker, running and waiting."""
    tolerance: Annotated[float, Bounds(at_least=0, less_than=1)] = 0.1
    """queue_depth: a pool is left as it is while the requests per worker are within this share of the target."""
    scale_to_zero: bool = False
    """Whether an idle pool may lose its last worker: only where routers may hold requests for as long as a start
    takes."""

    def __post_init__(self) -> None:
        check_limits(self)
