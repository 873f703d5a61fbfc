"""Bounds on what one router takes on: requests in flight and the size of a prompt. Says no early, and when to return.

Pure: the clock is the caller's. Knows nothing of workers, so it cannot say whether anybody will serve what it admits.
"""

from __future__ import annotations

from dataclasses import dataclass

_SMOOTHING = 0.1  # weight of the newest duration in the running mean
_MIN_RETRY_S, _MAX_RETRY_S = 0.1, 60.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request was not let in."""

    reason: str  # "inflight_requests", "prompt_bytes" or "stopping"
    message: str
    retry_after_s: float | None  # None: coming back will not help


class Admission:
    """Counts what is in flight. Every admit() that gives None is followed by exactly one leave()."""

    def __init__(self, max_inflight_requests: int, max_prompt_bytes: int) -> None:
        self._max_inflight_requests = max_inflight_requests
        self._max_prompt_bytes = max_prompt_bytes
        self._mean_duration_s = 1.0
        self.num_inflight = 0
        self.is_stopping = False

    def admit(self, num_prompt_bytes: int) -> Refusal | None:
        """Take a request in, or say why not."""
        if self.is_stopping:
            return Refusal("stopping", "this router is going down", None)
        if num_prompt_bytes > self._max_prompt_bytes:
            message = f"has {num_prompt_bytes} bytes, more than the {self._max_prompt_bytes} this router accepts"
            return Refusal("prompt_bytes", message, None)
        if self.num_inflight >= self._max_inflight_requests:
            message = f"{self.num_inflight} requests are in flight, the limit of this router"
            return Refusal("inflight_requests", message, self._retry_after_s())
        self.num_inflight += 1
        return None

    def leave(self, duration_s: float) -> None:
        """A request that was let in has ended, whichever way."""
        assert self.num_inflight > 0, "leave() without admit()"
        self.num_inflight -= 1
        self._mean_duration_s += _SMOOTHING * (duration_s - self._mean_duration_s)

    def _retry_after_s(self) -> float:
        # By Little's law one of n requests ends every mean/n seconds.
        return min(_MAX_RETRY_S, max(_MIN_RETRY_S, self._mean_duration_s / self.num_inflight))
