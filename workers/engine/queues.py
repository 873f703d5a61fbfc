"""Where each request of an engine is: waiting, waiting for blocks, running, or waiting for its blocks to be stored.

Knows nothing of blocks or plans.
"""

from __future__ import annotations

from bisect import insort
from collections import deque

from workers.engine.request import Request, RequestRole


class RequestQueues:
    """A request is in `requests` as long as it is here, and in exactly one of the queues."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.waiting: deque[Request] = deque()
        self.waiting_for_kv: list[Request] = []
        self.running: list[Request] = []  # the earliest first
        self.storing: list[Request] = []

    def run(self, request: Request) -> None:
        """Put a request among the running ones."""
        insort(self.running, request, key=lambda r: r.order)

    def leave(self, request: Request) -> None:
        """Take a request out of its queue."""
        for queue in (self.running, self.waiting_for_kv, self.storing, self.waiting):
            if request in queue:
                queue.remove(request)
                return

    @property
    def num_active(self) -> int:
        """Requests that take part in the batch, or will; those whose client does not read stop no others."""
        return sum(not r.is_stalled for r in (*self.running, *self.waiting_for_kv))

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens accepted and not yet computed (decode requests bring theirs)."""
        return sum(
            r.num_given_tokens - r.num_computed_tokens
            for r in (*self.waiting, *self.running)
            if r.num_computed_tokens < r.num_given_tokens and r.role is not RequestRole.DECODE
        )

    def victim(self) -> Request:
        """The request to preempt when blocks are short: one whose client does not read, else the latest.

        Blocks that are being pulled would not be free yet.
        """
        others = [r for r in self.waiting_for_kv if not r.has_load_in_flight]
        return max((*self.running, *others), key=lambda r: (r.is_stalled, r.order))
