"""Plans a step while the one before it still runs, so that the device never waits for a plan.

What a step will have done is known before it is done, but for the tokens that it chooses: they stand in the next plan
as places, and the device puts its own numbers there. A request that turns out to have stopped was computed once in
vain: the key and value of its last token went to a slot that nobody reads, and whoever gets the block next writes
after it, because steps run in order. A plan that moves blocks is not run ahead of: what came decides what is next.

Knows nothing of tensors; the scheduler knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from workers.request import Request, RequestRole, RequestStatus
from workers.step import ModelRunnerOutput, SchedulerOutput, pending_token


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A plan that was started, and for whom."""

    plan: SchedulerOutput
    owners: Mapping[str, Request]  # of all ids in the plan; an id may be somebody else's when the step is through
    result: Callable[[], ModelRunnerOutput]

    @property
    def moves_blocks(self) -> bool:
        """Pulls blocks, or publishes some that somebody waits for."""
        return bool(self.plan.loads or self.plan.stores)

    def outcome(self, requests: Mapping[str, Request]) -> tuple[SchedulerOutput, ModelRunnerOutput]:
        """Plan and output once it is through, as far as they concern requests that are still here."""
        plan, output = self.plan, self.result()
        if all(requests.get(request_id) is request for request_id, request in self.owners.items()):
            return plan, output
        here = {request_id for request_id, request in self.owners.items() if requests.get(request_id) is request}
        sampling = [r for r in plan.requests if r.sample is not None]
        return (
            replace(
                plan,
                requests=[r for r in plan.requests if r.request_id in here],
                loads=[t for t in plan.loads if t.request_id in here],
                stores=[t for t in plan.stores if t.request_id in here],
            ),
            replace(
                output,
                sampled_token_ids=[
                    token for r, token in zip(sampling, output.sampled_token_ids, strict=True) if r.request_id in here
                ],
                num_loaded_blocks=[
                    n for t, n in zip(plan.loads, output.num_loaded_blocks, strict=True) if t.request_id in here
                ],
                num_stored_blocks=[
                    n for t, n in zip(plan.stores, output.num_stored_blocks, strict=True) if t.request_id in here
                ],
            ),
        )


def owners_of(plan: SchedulerOutput, requests: Mapping[str, Request]) -> dict[str, Request]:
    """The requests that a plan names."""
    ids = [part.request_id for parts in (plan.requests, plan.loads, plan.stores) for part in parts]
    return {request_id: requests[request_id] for request_id in ids}


@contextmanager
def as_if_done(step: StepInFlight, max_model_len: int) -> Iterator[None]:
    """Within it, running requests stand where they will stand after the step, with places for their new tokens."""
    assumed: list[tuple[Request, int, bool]] = []
    place = 0
    for chunk in step.plan.requests:
        request = step.owners[chunk.request_id]
        if request.status is RequestStatus.RUNNING:
            goes_on = chunk.sample is not None and _goes_on(request, max_model_len)
            assumed.append((request, request.num_computed_tokens, goes_on))
            request.num_computed_tokens += chunk.num_scheduled_tokens
            if goes_on:
                request.token_ids.append(pending_token(place))
                request.window_tokens -= 1
        place += chunk.sample is not None
    try:
        yield
    finally:
        for request, num_computed_tokens, goes_on in assumed:
            if goes_on:
                request.token_ids.pop()
                request.window_tokens += 1
            if request.status is RequestStatus.RUNNING:  # not preempted within
                request.num_computed_tokens = num_computed_tokens


def _goes_on(request: Request, max_model_len: int) -> bool:
    """Unless the next token happens to be one that stops it."""
    return (
        request.role is not RequestRole.PREFILL
        and request.num_output_tokens + 1 < request.sampling.max_tokens
        and request.num_tokens + 1 < max_model_len
    )
