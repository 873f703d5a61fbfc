"""How many workers keep to the objectives: a queue for prefill, Little's law for decode, both for mixed workers.

Formulas: shared/research/control.md, section 1.4. A prompt of u uncached tokens costs ceil(u/chunk) steps and u tokens;
streams at once are arrivals x output tokens x step time (Little), and about Poisson. What is computed here is the
steady state for a demand that lasts. Knows nothing of forecasts, budgets or of the workers that exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from costs.step_time import StepCost
from planner.scaling.observation import PoolObservation
from planner.scaling.queueing import ServiceTime, normal_quantile, wait_quantile_s

MOST_WORKERS = 1 << 16  # where a search ends: beyond any pool


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """What workers must keep to. See AutoscalingConfig."""

    ttft_s: float
    ttft_quantile: float
    tpot_s: float
    tpot_quantile: float
    headroom: float
    max_utilisation: float
    recovery_s: float


@dataclass(frozen=True, slots=True)
class Capacity:
    """The least number of workers, and why not one less."""

    num_workers: int
    binding: str
    """What needs that many: ttft, utilisation, queue, link, tpot, kv_blocks, max_num_seqs, idle."""
    terms: dict[str, float]
    """What the number was computed from; units are in the names."""
    unreachable: str = ""
    """An objective that no number of workers reaches, and why; empty: none."""


def workers_for(pool: PoolObservation, arrivals_per_s: float, cost: StepCost, objectives: Objectives) -> Capacity:
    """The least number of workers of this pool's role for these arrivals and for what already waits."""
    by_role = {"prefill": _prefill_workers, "decode": _decode_workers, "mixed": _mixed_workers}
    return by_role[pool.role](pool, arrivals_per_s, cost, objectives)


# ---- prefill


def prefill_service(pool: PoolObservation, cost: StepCost, beside_s: float = 0.0) -> ServiceTime:
    """How long a worker takes for a prompt. beside_s: what the streams that decode beside it add to a step."""
    tokens = pool.uncached_tokens_mean
    step_s, chunk = cost.base_s + beside_s, pool.max_num_batched_tokens
    # The last chunk is half full on average.
    mean_s = step_s * max(1.0, tokens / chunk + 0.5) + cost.s_per_prefill_token * tokens
    variance = max(0.0, pool.uncached_tokens_square_mean - tokens**2)
    deviation_s = (cost.s_per_prefill_token + step_s / chunk) * math.sqrt(variance)
    return ServiceTime(mean_s, (deviation_s / mean_s) ** 2 if mean_s > 0 else 0.0)


def _prefill_workers(pool: PoolObservation, arrivals: float, cost: StepCost, objectives: Objectives) -> Capacity:
    service = prefill_service(pool, cost)
    load = arrivals * service.mean_s
    s_per_token = cost.s_per_prefill_token + cost.base_s / pool.max_num_batched_tokens
    ttft_s, unreachable = _ttft(pool, arrivals, service, objectives)
    bounds = {
        "idle": 0,
        "utilisation": math.ceil(load / objectives.max_utilisation),
        "queue": math.ceil(pool.num_queued_tokens * s_per_token / objectives.recovery_s),
        "link": _link_bound(pool, arrivals),
        "ttft": _least(lambda n: ttft_s(n) <= objectives.ttft_s) if arrivals > 0 else 0,
    }
    binding = max(bounds, key=lambda name: bounds[name])
    count = bounds[binding]
    terms = {
        "arrivals_per_s": arrivals,
        "service_ms": service.mean_s * 1e3,
        "service_cv2": service.cv2,
        "service_quantile_ms": service.quantile_s(objectives.ttft_quantile) * 1e3,
        "handoff_ms": pool.handoff_s * 1e3,
        "ttft_ms": ttft_s(count) * 1e3 if count else 0.0,
        "ttft_objective_ms": objectives.ttft_s * 1e3,
        "utilisation": load / count if count else 0.0,
        **{f"{name}_workers": float(bound) for name, bound in bounds.items() if name != "idle"},
    }
    return Capacity(count, binding, terms, unreachable)


def _ttft(
    pool: PoolObservation, arrivals: float, service: ServiceTime, objectives: Objectives
) -> tuple[Callable[[int], float], str]:
    """Time to first token by number of workers, and what is said where no number suffices.

    The sum of two quantiles exceeds the quantile of the sum. Where a long prompt alone misses the objective, only
    shorter ones can be helped: then the median prompt takes the place of the long one, and if that misses it too, the
    wait has no bound.
    """
    quantile = objectives.ttft_quantile
    own_s, unreachable = service.quantile_s(quantile) + pool.handoff_s, ""
    if own_s >= objectives.ttft_s:
        unreachable = f"ttft: a prompt at the {quantile:.0%} quantile alone takes {own_s * 1e3:.0f} ms"
        own_s = service.quantile_s(0.5) + pool.handoff_s
        if own_s >= objectives.ttft_s:
            own_s = -math.inf

    def at(num_workers: int) -> float:
        wait_s = wait_quantile_s(num_workers, arrivals, service, quantile, pool.interarrival_cv2)
        return wait_s * pool.queue_imbalance + own_s if math.isfinite(own_s) else 0.0

    return at, unreachable


def _link_bound(pool: PoolObservation, arrivals: float) -> int:
    if not pool.link_bytes_per_s:
        return 0
    return math.ceil(arrivals * pool.uncached_tokens_mean * pool.kv_bytes_per_token / pool.link_bytes_per_s)


# ---- decode


def _most_by_kv(pool: PoolObservation, objectives: Objectives) -> float:
    """Streams that one worker's KV blocks hold, halfway through their outputs; infinite where blocks are not known."""
    tokens = pool.kv_blocks_per_worker * pool.block_size * (1 - objectives.headroom)
    return tokens / max(1.0, _stream_tokens(pool)) if tokens else math.inf


def _stream_tokens(pool: PoolObservation) -> float:
    """Of a running stream, halfway through its output."""
    return pool.context_tokens_mean + pool.output_tokens_mean / 2


def _decode_workers(pool: PoolObservation, arrivals: float, cost: StepCost, objectives: Objectives) -> Capacity:
    per_stream_s = cost.s_per_decode_seq + cost.s_per_context_token * _stream_tokens(pool)
    target_s = objectives.tpot_s * (1 - objectives.headroom)
    most = {
        "tpot": (target_s - cost.base_s) / per_stream_s if per_stream_s > 0 else math.inf,
        "kv_blocks": _most_by_kv(pool, objectives),
        "max_num_seqs": float(pool.max_num_seqs),
    }
    unreachable = ""
    if most["tpot"] < 1:
        step_ms = cost.step_s(0, 1, _stream_tokens(pool)) * 1e3
        unreachable = f"tpot: one stream alone takes {step_ms:.1f} ms of {target_s * 1e3:.1f} ms a token"
        del most["tpot"]
    binding = min(most, key=lambda name: most[name])
    batch = max(1, math.floor(most[binding]))
    step_s = cost.base_s + per_stream_s * batch
    streams = arrivals * pool.output_tokens_mean * step_s
    at_quantile = streams + normal_quantile(objectives.tpot_quantile) * math.sqrt(streams)
    present = float(pool.num_running + pool.num_waiting)
    terms = {
        "arrivals_per_s": arrivals,
        "step_ms": step_s * 1e3,
        "tpot_objective_ms": objectives.tpot_s * 1e3,
        "batch": float(batch),
        "streams": streams,
        "streams_at_quantile": at_quantile,
        "streams_now": present,
        **{f"batch_by_{name}": value for name, value in most.items() if math.isfinite(value)},
    }
    count = math.ceil(max(at_quantile, present) / batch)
    return Capacity(count, binding if count else "idle", terms, unreachable)


# ---- mixed


def _mixed_workers(pool: PoolObservation, arrivals: float, cost: StepCost, objectives: Objectives) -> Capacity:
    """Prompts lengthen the steps of the streams beside them, and streams those of the prompts."""
    if pool.is_idle and arrivals == 0:
        return Capacity(0, "idle", {})
    # What holds with any number of workers is found with very many.
    limits = {name for name, holds in _mixed(pool, arrivals, cost, objectives, MOST_WORKERS)[0].items() if not holds}

    def failing(num_workers: int) -> list[str]:
        checks = _mixed(pool, arrivals, cost, objectives, num_workers)[0]
        return [name for name, holds in checks.items() if not holds and name not in limits]

    count = _least(lambda n: not failing(n))
    binding = failing(count - 1)[0] if count > 1 else "utilisation"
    terms = _mixed(pool, arrivals, cost, objectives, count)[1]
    unreachable = f"{', '.join(sorted(limits))}: missed by one request alone on a worker" if limits else ""
    return Capacity(count, binding, terms, unreachable)


def _mixed(
    pool: PoolObservation, arrivals: float, cost: StepCost, objectives: Objectives, num_workers: int
) -> tuple[dict[str, bool], dict[str, float]]:
    """Whether each limit holds with that many workers, and the terms."""
    each = arrivals / num_workers
    per_stream_s = cost.s_per_decode_seq + cost.s_per_context_token * _stream_tokens(pool)
    # step = base + streams * per_stream + prompt tokens that arrive in a step * a;  streams = each * output * step
    for_prompts = each * pool.uncached_tokens_mean * cost.s_per_prefill_token
    left = 1 - for_prompts - each * pool.output_tokens_mean * per_stream_s
    if left <= 0 or for_prompts >= 1:
        return {"utilisation": False}, {"utilisation": math.inf}
    mean_step_s = cost.base_s / left
    streams = arrivals * pool.output_tokens_mean * mean_step_s
    high = streams + normal_quantile(objectives.tpot_quantile) * math.sqrt(streams)
    # More than that many streams at once are few enough to be nobody's quantile; one alone has a step of its own.
    batch = max(high, float(pool.num_running + pool.num_waiting)) / num_workers
    step_s = (cost.base_s + per_stream_s * max(1.0, batch)) / (1 - for_prompts)
    service = prefill_service(pool, cost, per_stream_s * batch)
    ttft_s, _ = _ttft(pool, each * num_workers, service, objectives)
    utilisation = each * service.mean_s
    s_per_token = cost.s_per_prefill_token + cost.base_s / pool.max_num_batched_tokens
    checks = {
        "ttft": ttft_s(num_workers) <= objectives.ttft_s,
        "utilisation": utilisation <= objectives.max_utilisation,
        "queue": pool.num_queued_tokens * s_per_token <= objectives.recovery_s * num_workers,
        "tpot": step_s <= objectives.tpot_s * (1 - objectives.headroom),
        "kv_blocks": batch <= max(1.0, _most_by_kv(pool, objectives)),
        "max_num_seqs": batch <= pool.max_num_seqs,
    }
    terms = {
        "arrivals_per_s": arrivals,
        "service_ms": service.mean_s * 1e3,
        "ttft_ms": ttft_s(num_workers) * 1e3,
        "ttft_objective_ms": objectives.ttft_s * 1e3,
        "step_ms": step_s * 1e3,
        "tpot_objective_ms": objectives.tpot_s * 1e3,
        "batch": batch,
        "utilisation": utilisation,
    }
    return checks, terms


def _least(suffices: Callable[[int], bool]) -> int:
    """The least number of workers that suffices, by doubling and halving; MOST_WORKERS if none does."""
    high = 1
    while high < MOST_WORKERS and not suffices(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high
