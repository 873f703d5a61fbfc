"""Passes to the prefetcher which queued requests will pull blocks, and which wait no more.

The scheduler says which; a thread of kvstore.tiers.prefetch does it. Knows nothing of tiers.
"""

from __future__ import annotations

from kvstore.tiers.prefetch import Prefetcher
from workers.engine.request import Request, RequestStatus
from workers.engine.scheduler import Scheduler

MAX_QUEUED = 8  # requests, from the head of the queue
_QUEUED = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class QueuePrefetch:
    """On the engine's thread, between its steps."""

    def __init__(self, prefetcher: Prefetcher) -> None:
        self._prefetcher = prefetcher
        self._known: dict[str, Request] = {}

    def note(self, scheduler: Scheduler) -> None:
        """What changed in the queue since the last step; costs as much as there are known requests, not queued ones."""
        if not self._known and not scheduler.waiting:
            return
        for request in [request for request in self._known.values() if request.status not in _QUEUED]:
            del self._known[request.request_id]
            self._prefetcher.release(request.request_id, is_used=request.status is not RequestStatus.FINISHED)
        for request_id, names in scheduler.queued_pulls(MAX_QUEUED, self._known):
            self._known[request_id] = scheduler.requests[request_id]
            if names:
                self._prefetcher.add(request_id, names)
