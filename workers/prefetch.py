"""Tells the prefetcher which queued requests will pull blocks, and which wait no more.

The scheduler says which; a thread of kvstore.prefetch does it. Knows nothing of tiers.
"""

from __future__ import annotations

from kvstore.prefetch import Prefetcher
from workers.scheduler import Scheduler

MAX_QUEUED = 8  # requests, from the head of the queue


class QueuePrefetch:
    """On the engine's thread, between its steps."""

    def __init__(self, prefetcher: Prefetcher) -> None:
        self._prefetcher = prefetcher
        self._known: set[str] = set()

    def note(self, scheduler: Scheduler) -> None:
        """What changed in the queue since the last step."""
        if not self._known and not scheduler.waiting:
            return
        for request_id in self._known - {request.request_id for request in scheduler.waiting}:
            self._known.discard(request_id)
            self._prefetcher.release(request_id, is_used=request_id in scheduler.requests)
        for request_id, names in scheduler.queued_pulls(MAX_QUEUED, self._known):
            self._known.add(request_id)
            if names:
                self._prefetcher.want(request_id, names)
