"""Which requests go into which of the plans that a pipeline has in flight, so that all its stages have work.

As many plans are in flight as there are stages. A request's next token needs the one before, which is chosen when its
plan has passed all stages: so the requests are spread over the plans, each in one at a time. Chunks of a prompt need no
token and may follow each other in successive plans. Knows nothing of stages' ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from workers.engine.request import Request


class PlanSpread:
    """Of one engine. With one stage every plan takes whatever there is."""

    def __init__(self, num_stages: int, max_num_seqs: int) -> None:
        self._num_stages = num_stages
        self._max_num_seqs = max_num_seqs
        self._number = 1  # of the plan that is being made
        self.max_running = self.max_requests = max_num_seqs

    def begin(self, running: Sequence[Request], num_waiting: int) -> None:
        """A plan is made now. Afterwards max_running bounds its requests among those that run already, and max_requests
        all of them: the second counts on waiting ones, for which there may be no blocks."""
        if self._num_stages > 1:
            num_running = sum(not request.is_stalled for request in running)
            self.max_running = self._share(num_running)
            self.max_requests = self._share(min(num_running + num_waiting, self._max_num_seqs))

    def _share(self, num_requests: int) -> int:
        return max(1, min(self._max_num_seqs, -(-num_requests // self._num_stages)))

    def end(self) -> None:
        """The plan is made, and has requests."""
        self._number += 1

    def note(self, request: Request) -> None:
        """The plan chooses the request's next token."""
        request.pending_in_plan = self._number

    def awaits_turn(self, request: Request) -> bool:
        """Whether the plan of the request's pending token has not yet had its time in all stages. If it has, then its
        last stage hands the token to the first, which would do nothing else meanwhile."""
        return request.num_pending_tokens > 0 and self._number - request.pending_in_plan < self._num_stages
