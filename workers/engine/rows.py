"""Which request has which row of the ranks' state.

A row holds a request's block tables and sampling parameters on every rank, so that plans bring changes only. Requests
whose clients do not read keep their blocks, and lose their row when another one needs it. Knows nothing of ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection

from workers.engine.request import Request


class BatchRows:
    """Rows 0 .. num_rows - 1, the lowest free one first: rows that lie together are read without being gathered."""

    def __init__(self, num_rows: int) -> None:
        self._free = list(range(num_rows))
        self._holders: dict[int, Request] = {}
        self._unsent: set[int] = set()  # rows that changed hands, or that a rank lost

    def take(self, request: Request, used: Collection[int]) -> bool:
        """Make sure that a request has a row; True when the ranks must be sent all of it.

        used: rows of the step that is being planned. There are as many rows as requests in a step: when none is free,
        somebody who is not in this one has one.
        """
        if request.row < 0:
            if not self._free:
                others = [holder for row, holder in self._holders.items() if row not in used]
                self.give_back(max(others, key=lambda r: (r.is_stalled, r.order)))
            request.row = heapq.heappop(self._free)
            self._holders[request.row] = request
            return True
        if request.row in self._unsent:
            self._unsent.remove(request.row)
            return True
        return False

    def give_back(self, request: Request) -> None:
        """The request needs no row any more, or for now."""
        if request.row >= 0:
            del self._holders[request.row]
            self._unsent.discard(request.row)
            heapq.heappush(self._free, request.row)
            request.row = -1

    def resend(self) -> None:
        """A rank lost its state: the next plan sends all rows."""
        self._unsent = set(self._holders)
