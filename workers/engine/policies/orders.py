"""Policies that are one sort key each: by arrival, by priority with ageing, by deadline. Pure."""

from __future__ import annotations

from workers.engine.policies.policy import Order, SchedulingPolicy
from workers.engine.request import Request


class FirstCome(SchedulingPolicy):
    """In the order of arrival."""

    def order(self, request: Request) -> Order:
        """By arrival."""
        return request.arrival_time_s, request.arrival_time_s, request.request_id


class ByPriority(SchedulingPolicy):
    """The smallest priority first, as in vLLM.

    One level is worth `ageing_s` of waiting: of two requests the one whose arrival + priority * ageing_s is smaller
    goes first, whenever they are compared. So a request is overtaken only by those that come at most
    (its priority - theirs) * ageing_s after it.
    """

    def __init__(self, ageing_s: float) -> None:
        self._ageing_s = ageing_s

    def order(self, request: Request) -> Order:
        """By priority and age."""
        due_s = request.arrival_time_s + request.priority * self._ageing_s
        return due_s, request.arrival_time_s, request.request_id


class ByDeadline(SchedulingPolicy):
    """The earliest deadline first.

    A request without one, or with a late one, counts as due `patience_s` after its arrival. Whoever comes later than
    that has a later deadline and does not overtake it.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s

    def order(self, request: Request) -> Order:
        """By deadline."""
        due_s = min(request.deadline_s, request.arrival_time_s + self._patience_s)
        return due_s, request.arrival_time_s, request.request_id
