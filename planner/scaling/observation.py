"""What a decision is made from: each pool's demand, workers and measured steps. Knows no source of it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSample:
    """Engine steps of one worker, as means over one interval."""

    duration_s: float
    """Of a step."""
    num_prefill_tokens: float
    """Prompt tokens that a step computed."""
    num_decode_seqs: float
    """Sequences that got a token from a step."""
    num_context_tokens: float
    """Tokens in the contexts of those sequences together."""
    worker_age_s: float
    """Since the worker became ready, at the interval's start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolObservation:
    """One pool. Its workers are those that serve in it now, in whichever pool they were started.

    Demand is what routers accepted. A decode pool's is counted there too, not at the end of prefill: behind a prefill
    pool that is too small it would seem idle.
    """

    name: str
    """Of the pool."""
    role: str
    """prefill, decode or mixed."""
    gpus_per_worker: int = 1
    """tp times pp."""
    tp: int = 1
    """Tensor-parallel ranks."""
    pp: int = 1
    """Pipeline stages."""
    fingerprint: str = ""
    """Of model, dtype and block size: workers change between pools only if it is the same."""
    min_workers: int = 1
    """Fewest workers."""
    max_workers: int = 1
    """Most workers."""
    configured_workers: int = 1
    """The pool's `replicas`."""
    pinned_workers: int | None = None
    """A count that an operator set by hand; the policy leaves it alone. None: not set."""

    num_ready: int = 0
    """Workers that take requests."""
    num_starting: int = 0
    """Workers that were asked for and are not ready."""
    num_silent: int = 0
    """Workers that run and do not report: nothing is known of their load."""
    num_flipping_in: int = 0
    """Workers that leave another pool for this one: still draining there, or not yet announced here."""
    num_draining: int = 0
    """Workers that retire: they hold their GPUs until they are gone."""
    startup_s: float = 60.0
    """From asking for a worker to its being ready, as measured."""

    metrics_age_s: float = 0.0
    """Age of the oldest figure below."""
    arrivals_per_s: float = 0.0
    """Requests accepted for this pool, over the last interval."""
    interarrival_cv2: float = 1.0
    """Squared coefficient of variation of the times between arrivals; 1 is a Poisson process."""
    uncached_tokens_mean: float = 0.0
    """Prompt tokens of a request that no cache holds."""
    uncached_tokens_square_mean: float = 0.0
    """Mean of their squares."""
    context_tokens_mean: float = 0.0
    """All prompt tokens of a request."""
    output_tokens_mean: float = 0.0
    """Tokens generated for a request."""
    num_waiting: int = 0
    """Requests that wait to join a batch."""
    num_running: int = 0
    """Requests in running batches."""
    num_queued_tokens: float = 0.0
    """Uncached prompt tokens of waiting requests, in the pool or in routers' queues."""
    num_kv_blocks_used: float = 0.0
    """KV blocks referenced by requests, in all workers together."""
    kv_blocks_per_worker: int = 0
    """KV blocks of one worker."""
    block_size: int = 16
    """Tokens of a KV block."""
    max_num_seqs: int = 32
    """Most requests in a running batch of one worker."""
    max_num_batched_tokens: int = 512
    """Most tokens of one step: the size of a chunk of prefill."""
    handoff_s: float = 0.0
    """Of a prefill pool: mean time from the end of a prefill to the decode worker's first step, for the KV transfer."""
    kv_bytes_per_token: float = 0.0
    """Of keys and values that leave a prefill worker; 0: not known, and the link bounds nothing."""
    link_bytes_per_s: float = 0.0
    """What one prefill worker can send; 0: not known."""
    queue_imbalance: float = 1.0
    """Measured wait over that of one common queue: what placement costs."""
    ttft_mean_s: float = 0.0
    """Time to first token of the last interval, to be shown beside the prediction."""
    tpot_mean_s: float = 0.0
    """Time per output token of the last interval."""
    step_samples: tuple[StepSample, ...] = ()
    """Steps measured since the last observation."""

    @property
    def num_workers(self) -> int:
        """Those that serve, or will without another decision."""
        return self.num_ready + self.num_starting + self.num_silent + self.num_flipping_in

    @property
    def num_gpus(self) -> int:
        """Held or asked for now."""
        return self.gpus_per_worker * (self.num_workers + self.num_draining)

    @property
    def is_idle(self) -> bool:
        """Nothing arrives, waits or runs. NaN is not idle."""
        return self.arrivals_per_s == 0 and self.num_waiting == 0 and self.num_running == 0

    def can_flip_to(self, other: PoolObservation) -> bool:
        """Whether a worker of this pool may serve in the other as it is, with its weights and its cache."""
        mine = (self.tp, self.pp, self.gpus_per_worker, self.fingerprint)
        return self.name != other.name and mine == (other.tp, other.pp, other.gpus_per_worker, other.fingerprint)


@dataclass(frozen=True, slots=True)
class Observation:
    """All pools at one time."""

    pools: tuple[PoolObservation, ...]
    """In any order; names are unique."""


_DEMAND = ("arrivals_per_s", "num_waiting", "num_running", "num_queued_tokens", "metrics_age_s", "startup_s")
# Means over requests: without requests there is nothing to average, and NaN is no fault.
_PER_REQUEST = (
    *("uncached_tokens_mean", "uncached_tokens_square_mean", "context_tokens_mean", "output_tokens_mean"),
    *("interarrival_cv2", "queue_imbalance", "handoff_s", "kv_bytes_per_token", "link_bytes_per_s"),
)


def why_unusable(pool: PoolObservation, max_age_s: float) -> str | None:
    """Why nothing may be concluded from this pool's figures, or None. A fresh zero is a zero."""
    names = _DEMAND if pool.is_idle else _DEMAND + _PER_REQUEST
    if pool.num_silent:
        return f"{pool.num_silent} workers run and do not report"
    bad = next((name for name in names if not 0 <= getattr(pool, name) < math.inf), None)
    if bad:
        return f"{bad} is {getattr(pool, bad)}"
    if pool.metrics_age_s > max_age_s:
        return f"metrics are {pool.metrics_age_s:.0f} s old, more than {max_age_s:.0f} s"
    return None
