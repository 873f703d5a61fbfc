"""One stream through the gRPC API, and a prompt for it."""

from __future__ import annotations

from switchyard_client import (
    Finished,
    GenerationClient,
    GenerationRequest,
    SamplingParams,
    Started,
    Target,
    Tokens,
)

PROMPT = tuple(range(1, 40))


def request(prompt: object = PROMPT, **sampling: object) -> GenerationRequest:
    options = {"max_tokens": 20, "temperature": 0.0, **sampling}
    return GenerationRequest(prompt, SamplingParams(**options))


async def collect(
    target: Target, order: GenerationRequest, resume_within_s: float = 30.0
) -> tuple[Started, list[int], str, Finished]:
    """Run one stream and check the shape that the contract gives it."""
    ids: list[int] = []
    text = ""
    async with GenerationClient(target, resume_within_s) as client:
        events = [event async for event in client.generate_async(order)]
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    for event in events[1:-1]:
        assert isinstance(event, Tokens)
        assert event.first_position == len(ids)
        ids += event.ids
        text += event.text
    assert events[-1].num_output_tokens == len(ids)
    return events[0], ids, text, events[-1]
