"""Where each request of an engine is: waiting, waiting for blocks, running, or waiting for its blocks to be stored.

Knows nothing of blocks or plans.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import chain

from workers.engine.policies.policy import SchedulingPolicy
from workers.engine.request import Request, RequestRole, RequestStatus


class WaitingQueue:
    """Requests that hold no blocks: one sorted list per tenant. To add or remove one costs O(log n) comparisons."""

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        self._of_tenant: dict[bytes, list[Request]] = {}  # none is empty
        self._num_requests = 0
        self.num_prompt_tokens = 0  # of requests but decode ones, which bring theirs

    def add(self, request: Request) -> None:
        """Put a request in its place."""
        tenant = self._policy.tenant(request)
        if tenant not in self._of_tenant:
            self._policy.queued(request, self._of_tenant)
            self._of_tenant[tenant] = []
        insort(self._of_tenant[tenant], request, key=self._policy.order)
        self._num_requests += 1
        self.num_prompt_tokens += _prompt_tokens(request)

    def remove(self, request: Request) -> None:
        """Take a request out, which must be here."""
        tenant = self._policy.tenant(request)
        requests = self._of_tenant[tenant]
        index = bisect_left(requests, self._policy.order(request), key=self._policy.order)
        assert requests[index] is request, f"{request.request_id} does not wait where it should"
        del requests[index]
        if not requests:
            del self._of_tenant[tenant]
        self._num_requests -= 1
        self.num_prompt_tokens -= _prompt_tokens(request)

    def in_order(self) -> Iterator[Request]:
        """As they are to be admitted; whoever was given out last may be removed before the next is asked for.

        The policy is asked anew after each one: what it was told of an admission counts for the next.
        """
        service, order = self._policy.service, self._policy.order
        heads = [(service(tenant), order(requests[0]), tenant, 0) for tenant, requests in self._of_tenant.items()]
        heapq.heapify(heads)
        while heads:
            _, _, tenant, index = heapq.heappop(heads)
            request = self._of_tenant[tenant][index]
            yield request
            requests = self._of_tenant.get(tenant, [])
            if index < len(requests) and requests[index] is request:
                index += 1
            if index < len(requests):
                heapq.heappush(heads, (service(tenant), order(requests[index]), tenant, index))

    def __iter__(self) -> Iterator[Request]:
        """In no order that means anything."""
        return chain.from_iterable(self._of_tenant.values())

    def __len__(self) -> int:
        return self._num_requests


class RequestQueues:
    """A request is in `requests` as long as it is here, and in exactly one of the queues."""

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        self.requests: dict[str, Request] = {}
        self.waiting = WaitingQueue(policy)
        self.waiting_for_kv: list[Request] = []
        self.running: list[Request] = []  # the first by the policy's run_order first
        self.storing: list[Request] = []

    def run(self, request: Request) -> None:
        """Put a request among the running ones."""
        insort(self.running, request, key=self._policy.run_order)

    def leave(self, request: Request) -> None:
        """Take a request out of its queue."""
        match request.status:
            case RequestStatus.RUNNING:
                self.running.remove(request)
            case RequestStatus.WAITING_FOR_KV:
                self.waiting_for_kv.remove(request)
            case RequestStatus.STORING:
                self.storing.remove(request)
            case _:
                self.waiting.remove(request)

    @property
    def num_active(self) -> int:
        """Requests that take part in the batch, or will; those whose client does not read stop no others."""
        return sum(not r.is_stalled for r in (*self.running, *self.waiting_for_kv))

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens accepted and not yet computed (decode requests bring theirs)."""
        return self.waiting.num_prompt_tokens + sum(
            r.num_given_tokens - r.num_computed_tokens
            for r in self.running
            if r.num_computed_tokens < r.num_given_tokens and r.role is not RequestRole.DECODE
        )

    def victim(self) -> Request:
        """The request to preempt when blocks are short: one whose client does not read, else the policy's last.

        Blocks that are being pulled would not be free yet.
        """
        others = [r for r in self.waiting_for_kv if not r.has_load_in_flight]
        return max((*self.running, *others), key=lambda r: (r.is_stalled, self._policy.run_order(r)))

    def has_later_pull(self, request: Request) -> bool:
        """Whether one behind this request is pulling blocks, and can be preempted when they have come."""
        order = self._policy.run_order(request)
        return any(r.has_load_in_flight and self._policy.run_order(r) > order for r in self.waiting_for_kv)


def _prompt_tokens(request: Request) -> int:
    return 0 if request.role is RequestRole.DECODE else request.num_given_tokens
