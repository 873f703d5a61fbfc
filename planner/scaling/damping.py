"""When a pool follows what its policy wants: windows over recent wants, limits per decision, and longer waits after a
reversal.

A pool grows to the least that was needed during the whole of `up_delay_s`, and shrinks to the most that would have been
enough in the whole of `down_delay_s` (the stabilization windows of Kubernetes' HPA). Growth soon after a shrink is a
reversal: it doubles the down window, for a pool between two sizes would go back and forth for ever (dynamo issue 9294).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from planner.scaling.config import AutoscalingConfig
from planner.scaling.observation import PoolObservation
from planner.scaling.policies.policy import Learned, Want

_MOST_DOUBLINGS = 2
_PAUSE_INTERVALS = 3  # decisions further apart than this many intervals leave a gap
_REVERSAL_WINDOWS = 4  # growth this many down windows after a shrink, or sooner, reverses it


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the policy wanted at one time."""

    at_s: float
    least: int
    enough: int


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """What decisions remember of a pool."""

    learned: Learned = field(default_factory=Learned)
    recent: tuple[Wanted, ...] = ()
    """Oldest first; one is older than the longest window."""
    held_at_s: float | None = None
    """Last time that nothing was known of the pool."""
    grew_at_s: float | None = None
    """Last decision that made it larger."""
    shrank_at_s: float | None = None
    """Last decision that made it smaller."""
    num_reversals: int = 0
    """Doublings of the down window."""
    num_ready: int = 0
    """At the last decision."""
    starting_since_s: float | None = None
    """Since when workers have been starting and none has become ready; None: none is starting."""


@dataclass(frozen=True, slots=True)
class Damped:
    """What damping makes of a want."""

    target: int
    goal: int
    """Where it would go without limits per decision."""
    flip_floor: int
    """It may give workers above this many to other pools at once."""
    pressure_floor: int
    """Without more than this many it misses its objectives: what lies above may go when the budget is short."""
    reason: str


def down_window_s(pool: PoolObservation, memory: PoolMemory, config: AutoscalingConfig) -> float:
    """A worker that is let go costs a start to get back."""
    return float(max(config.down_delay_s, pool.startup_s) * 2**memory.num_reversals)


def shrink_step(current: int, config: AutoscalingConfig) -> int:
    """Most workers that a pool loses in one decision; never the last one together with others."""
    return max(1, min(int(current * config.shrink_share), current - 1))


def remember(
    memory: PoolMemory, want: Want, pool: PoolObservation, config: AutoscalingConfig, now_s: float
) -> PoolMemory:
    """With one more want, and without those that no window needs. After a pause (a hold, a restart) nothing is known of
    the time between, and the windows begin anew."""
    longest_s = max(down_window_s(pool, memory, config), config.up_delay_s, config.flip_delay_s)
    paused = bool(memory.recent) and now_s - memory.recent[-1].at_s > _PAUSE_INTERVALS * config.interval_s
    samples = [*(() if paused else memory.recent), Wanted(now_s, want.least, want.enough)]
    while len(samples) > 1 and samples[1].at_s <= now_s - longest_s:
        samples.pop(0)
    return dataclasses.replace(memory, recent=tuple(samples))


def damp(pool: PoolObservation, memory: PoolMemory, config: AutoscalingConfig, now_s: float) -> Damped:
    """Where the pool goes now. The memory has the newest want."""
    current, newest = pool.num_workers, memory.recent[-1]
    up_delay_s = config.up_delay_s if current else 0.0
    needed = min((sample.least for sample in _within(memory, now_s, up_delay_s) or ()), default=current)
    enough = _most_enough(memory, now_s, down_window_s(pool, memory, config))
    flip_floor = _most_enough(memory, now_s, config.flip_delay_s)
    window = _within(memory, now_s, config.flip_delay_s)
    pressure_floor = max(sample.least for sample in window) if window else current
    if needed > current:
        target, goal = min(needed, current + max(4, current)), needed
        reason = f"{newest.least} needed" + ("" if target == needed else ", grown step by step")
    elif enough is not None and enough < current:
        target, goal = max(enough, current - shrink_step(current, config)), enough
        reason = f"{enough} have been enough for {down_window_s(pool, memory, config):.0f} s"
    else:
        target = goal = current
        reason = f"{newest.least} needed, {newest.enough} enough"
        if newest.least > current and current < pool.max_workers:
            reason += f"; grows when that lasts {config.up_delay_s:.0f} s"
        elif newest.enough < current and current > pool.min_workers:
            reason += f"; shrinks when that lasts {down_window_s(pool, memory, config):.0f} s"
    return Damped(target, goal, current if flip_floor is None else flip_floor, min(current, pressure_floor), reason)


def moved(memory: PoolMemory, current: int, target: int, window_s: float, now_s: float) -> PoolMemory:
    """After a decision: whether this was a reversal."""
    if target < current:
        return dataclasses.replace(memory, shrank_at_s=now_s)
    if target > current:
        shrank = memory.shrank_at_s is not None and memory.shrank_at_s > (memory.grew_at_s or float("-inf"))
        reversal = shrank and now_s - (memory.shrank_at_s or 0.0) <= _REVERSAL_WINDOWS * window_s
        doublings = min(_MOST_DOUBLINGS, memory.num_reversals + 1) if reversal else memory.num_reversals
        return dataclasses.replace(memory, grew_at_s=now_s, num_reversals=doublings)
    quiet = memory.shrank_at_s is not None and now_s - memory.shrank_at_s > _REVERSAL_WINDOWS * window_s
    return dataclasses.replace(memory, num_reversals=0) if quiet and memory.num_reversals else memory


def follow_starts(memory: PoolMemory, pool: PoolObservation, now_s: float) -> PoolMemory:
    """Since when nothing has come of what was asked for."""
    came = pool.num_ready > memory.num_ready
    since = None if not pool.num_starting else now_s if came else memory.starting_since_s
    if pool.num_starting and since is None:
        since = now_s
    return dataclasses.replace(memory, num_ready=pool.num_ready, starting_since_s=since)


def _within(memory: PoolMemory, now_s: float, window_s: float) -> list[Wanted] | None:
    """The wants of the last window_s, or None if they do not reach back so far."""
    if not memory.recent or memory.recent[0].at_s > now_s - window_s:
        return None
    return [sample for sample in memory.recent if sample.at_s >= now_s - window_s] or [memory.recent[-1]]


def _most_enough(memory: PoolMemory, now_s: float, window_s: float) -> int | None:
    """What would have been enough at every time of the window; None if some of it is not known."""
    window = _within(memory, now_s, window_s)
    if window is None or (memory.held_at_s is not None and memory.held_at_s > now_s - window_s):
        return None
    return max(sample.enough for sample in window)
