"""Equal service for the tenants that want it: the virtual token counter of Sheng et al., "Fairness in Serving Large
Language Models" (arXiv 2401.00588).

Each tenant has a counter of weighted tokens: those of a prompt when it is admitted, cached or not, and each generated
one. The waiting tenant with the smallest counter is admitted from next. A tenant that had nothing in the queue begins
at least at the smallest counter there, so that nobody saves up service while it asks for none.

Bound: while two tenants both have requests in the queue, their counters differ by at most

    prompt_weight * longest prompt + output_weight * most running requests * longest completion

for the smaller one is admitted from, and what the other gets meanwhile is the rest of what it has running. The service
of two such tenants over any time differs by at most twice as much. Pure; knows nothing of who a tenant is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from workers.engine.policies.policy import Order, SchedulingPolicy
from workers.engine.request import Request

_MIN_PRUNED = 1024  # tenants: fewer counters are not worth a look


class FairShare(SchedulingPolicy):
    """Weights: what a token counts as."""

    def __init__(self, prompt_weight: float, output_weight: float) -> None:
        self._prompt_weight = prompt_weight
        self._output_weight = output_weight
        self._counters: dict[bytes, float] = {}
        self._level = 0.0  # no counter in the queue is below it; what is not above it need not be kept
        self._last_admitted = b""
        self._prune_at = _MIN_PRUNED

    def order(self, request: Request) -> Order:
        """By arrival, within a tenant."""
        return request.arrival_time_s, request.arrival_time_s, request.request_id

    def run_order(self, request: Request) -> Order:
        """By what the tenant had had when the request was first admitted.

        Not by its counter now: two tenants whose counters are nearly the same would preempt each other in turns.
        """
        return request.share_tag, request.arrival_time_s, request.request_id

    def tenant(self, request: Request) -> bytes:
        """The request's."""
        return request.tenant

    def service(self, tenant: bytes) -> float:
        """The tenant's counter, in weighted tokens."""
        return self._counters.get(tenant, self._level)

    def queued(self, request: Request, waiting: Collection[bytes]) -> None:
        """Lift the counter to the smallest of the queue; where it was empty, to that of the last one there."""
        least = min(map(self.service, waiting), default=self.service(self._last_admitted))
        self._level = max(self._level, least)
        self._counters[request.tenant] = max(self.service(request.tenant), least)
        if len(self._counters) >= self._prune_at:
            self._counters = {tenant: had for tenant, had in self._counters.items() if had > self._level}
            self._prune_at = 2 * len(self._counters) + _MIN_PRUNED

    def admitted(self, request: Request) -> None:
        """Count its prompt, the first time."""
        self._last_admitted = request.tenant
        if request.was_admitted:
            return
        request.share_tag = self.service(request.tenant)
        self._counters[request.tenant] = request.share_tag + self._prompt_weight * request.num_given_tokens

    def served(self, requests: Sequence[Request]) -> None:
        """Count generated tokens."""
        for request in requests:
            self._counters[request.tenant] = self.service(request.tenant) + self._output_weight
