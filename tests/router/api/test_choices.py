"""When the choices of a prompt begin, and what becomes of the first one's failure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from router.api.choices import interleave, streams_over_one_prompt
from router.events import Event, GenerationRequest, Started, Tokens
from router.sampling import SamplingParams

REQUESTS = [GenerationRequest((1, 2), SamplingParams(seed=i)) for i in range(3)]
STARTED = Started("s", "m", 2, 0)


class Service:
    """Streams of one event for each call of `release`, the first stream's; the others do not wait."""

    def __init__(self, events: list[Event | Exception]) -> None:
        self.log: list[str] = []
        self._events = events
        self._steps = asyncio.Semaphore(0)

    def release(self) -> None:
        self._steps.release()

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        number = request.sampling.seed
        self.log.append(f"{number} begins")
        for event in self._events:
            if number == 0:
                await self._steps.acquire()
            if isinstance(event, Exception):
                raise event
            yield event


def test_the_others_begin_when_the_second_token_has_come() -> None:
    async def check() -> list[tuple[int, Event]]:
        service = Service([STARTED, Tokens(0, (5,)), Tokens(1, (6,)), Tokens(2, (7,))])
        got: list[tuple[int, Event]] = []

        async def read() -> None:
            async for index, event in interleave(streams_over_one_prompt(REQUESTS, service.stream)):
                got.append((index, event))

        reading = asyncio.create_task(read())
        for _ in range(2):  # Started and the first token
            service.release()
            await asyncio.sleep(0.02)
            assert service.log == ["0 begins"]
        service.release()
        await asyncio.sleep(0.02)
        assert service.log == ["0 begins", "1 begins", "2 begins"]
        service.release()
        await reading
        return got

    got = asyncio.run(check())
    assert sorted(index for index, event in got[:3] if isinstance(event, Started)) == [0, 1, 2]
    for index in range(3):
        ids = [token for number, event in got if number == index and isinstance(event, Tokens) for token in event.ids]
        assert ids == [5, 6, 7]


def test_the_others_begin_at_the_end_of_a_first_stream_of_one_token() -> None:
    async def check() -> list[int]:
        service = Service([STARTED, Tokens(0, (5,))])
        service.release()
        service.release()
        return [index async for index, _ in interleave(streams_over_one_prompt(REQUESTS, service.stream))]

    assert sorted(asyncio.run(check())) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("num_events_before", [0, 1, 2])
def test_a_failure_of_the_first_stream_ends_the_call(num_events_before: int) -> None:
    async def check() -> None:
        events = [STARTED, Tokens(0, (5,))][:num_events_before]
        service = Service([*events, ValueError("broken")])
        for _ in range(3):
            service.release()
        async for _ in interleave(streams_over_one_prompt(REQUESTS, service.stream)):
            pass

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(check())
