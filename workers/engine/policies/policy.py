"""The seam between the scheduler and its policies. Pure; knows nothing of blocks, budgets or clocks.

Every policy sorts by keys that do not change while a request waits or runs. Age counts nevertheless: a key has the time
of arrival in it, so that whoever comes late enough goes behind. It follows that nobody starves, that two requests never
preempt each other in turns, and that a queue is a sorted list.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from workers.engine.request import Request

Order = tuple[float, float, str]
"""The smallest goes first. The last part is the request's id, so that no two are equal."""


class SchedulingPolicy(Protocol):
    """In which order requests are admitted and, when blocks are short, preempted. One engine owns it."""

    def order(self, request: Request) -> Order:
        """Place among the waiting requests of the same tenant. The same from `add` to the end of a request."""
        ...

    def run_order(self, request: Request) -> Order:
        """Place among the running ones: the last is preempted first. The same from its first admission to its end."""
        return self.order(request)

    def tenant(self, request: Request) -> bytes:
        """Whose queue a request waits in; one for all where tenants have no shares."""
        return b""

    def service(self, tenant: bytes) -> float:
        """What a tenant has had: the one with least is admitted from next."""
        return 0.0

    def queued(self, request: Request, waiting: Collection[bytes]) -> None:
        """A tenant that had nothing in the queue has this request there. waiting: the other tenants that have some."""
        return

    def admitted(self, request: Request) -> None:
        """A request got blocks; again after each preemption."""
        return

    def served(self, requests: Sequence[Request]) -> None:
        """Tokens were generated, one for each entry."""
        return
