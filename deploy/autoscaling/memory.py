"""What autoscalers of a cluster keep in its control Redis: state over a restart, decisions, an operator's pins, a lock.

Any later autoscaler, on any host, goes on from there, and `switchyard scale` reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from redis.exceptions import LockError

from kvstore.control.redis_decision_log import PREFIX, DecisionsUnavailable, RedisDecisionLog
from kvstore.redis_client import REDIS_ERRORS, address_of, connect
from planner.scaling.decide import ScalingState
from planner.scaling.record import (
    DecisionRecord,
    LineWriter,
    RecordError,
    Saved,
    Start,
    from_first_start,
    saved_from_line,
    to_line,
)

_START_EVERY = 100  # decisions: those that are kept can be made again from one of these lines on
_LOCK_S = 15.0


class MemoryUnavailable(Exception):
    """The Redis does not answer; the message is one line."""


class Memory:
    """Of one cluster. Every call but those of the lock may raise MemoryUnavailable."""

    def __init__(self, url: str, cluster: str) -> None:
        self._redis = connect(url)
        self._prefix = f"{PREFIX}{cluster}:"
        self._decisions = RedisDecisionLog(url, cluster)
        self._writer = LineWriter(_START_EVERY)
        self.problem = ""
        """Why the last try to hold the lock failed; empty also when another one holds it."""
        self._lock = self._redis.lock(self._prefix + "lock", _LOCK_S, blocking=False, thread_local=False)

    # ---- over a restart

    def load(self) -> Saved:
        """What was saved last; of a version that is not understood, or of nobody: an empty state."""
        raw = self._call(lambda: self._redis.get(self._prefix + "saved"))
        try:
            return saved_from_line(raw.decode()) if raw else Saved()
        except (RecordError, UnicodeDecodeError):
            return Saved()  # the rollout derives what is under way from what it sees

    def save(self, saved: Saved) -> None:
        """Replace it."""
        self._call(lambda: self._redis.set(self._prefix + "saved", to_line(saved)))

    def startups(self) -> dict[str, float]:
        """Seconds that workers of each pool took to start."""
        found = self._call(lambda: self._redis.hgetall(self._prefix + "startups"))
        return {pool.decode(): float(seconds) for pool, seconds in found.items()}

    def save_startups(self, startup_s: Mapping[str, float]) -> None:
        """Replace those that are given."""
        values = {pool: str(seconds) for pool, seconds in startup_s.items()}
        self._call(lambda: self._redis.hset(self._prefix + "startups", mapping=values))

    # ---- decisions

    def write(self, start: Start, record: DecisionRecord, after: ScalingState) -> None:
        """Append a decision; see LineWriter."""
        try:
            self._decisions.append(self._writer.lines(start, record, after))
        except DecisionsUnavailable as error:
            self._writer.begin_anew()
            raise MemoryUnavailable(str(error)) from None

    def lines(self) -> list[str]:
        """The decisions that are kept, oldest first, from a start on."""
        try:
            lines = self._decisions.last()
        except DecisionsUnavailable as error:
            raise MemoryUnavailable(str(error)) from None
        return from_first_start(lines)

    # ---- an operator's counts

    def pins(self) -> dict[str, int]:
        """Numbers of workers that were set by hand, by pool."""
        found = self._call(lambda: self._redis.hgetall(self._prefix + "pins"))
        return {pool.decode(): int(count) for pool, count in found.items()}

    def pin(self, pool: str, num_workers: int | None) -> None:
        """Set one, or with None leave the pool to the policy again."""
        key = self._prefix + "pins"
        if num_workers is None:
            self._call(lambda: self._redis.hdel(key, pool))
        else:
            self._call(lambda: self._redis.hset(key, pool, str(num_workers)))

    # ---- one at a time, where there is no Lease of Kubernetes

    def hold(self) -> bool:
        """Whether this is the autoscaler that acts; to be asked at least every five seconds."""
        try:
            held = bool(self._call(self._renew_or_acquire))
        except MemoryUnavailable as error:
            self.problem = str(error)
            return False
        self.problem = ""
        return held

    def _renew_or_acquire(self) -> bool:
        try:
            return bool(self._lock.reacquire())
        except LockError:  # not held, or held no more
            return bool(self._lock.acquire())

    def release(self) -> None:
        """Let another one act at once."""
        with contextlib.suppress(LockError, MemoryUnavailable):  # it is another's, or runs out
            self._call(self._lock.release)

    def close(self) -> None:
        """Give up the connections."""
        self._redis.close()
        self._decisions.close()

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except LockError:
            raise  # an answer of the Redis
        except REDIS_ERRORS as error:
            raise MemoryUnavailable(f"{address_of(self._redis)}: {error}") from error
