"""Several choices of one prompt: a stream for each, with a seed of its own, over one prompt's blocks.

The first stream of a prompt computes it; the others begin when its second token has come, and find the prompt's blocks
wherever they are placed. Where prefill is apart, a decode worker has chosen that token, so the blocks are in the host
tier; the first token may come before they are stored there. Knows nothing of HTTP, or of how a stream is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Callable, Sequence

from router.events import Event, GenerationRequest, PromptTokens, Started, Tokens
from router.sampling import invalid

MAX_STREAMS = 128  # of one call

Events = AsyncGenerator[Event, None]


def check_counts(num_prompts: int, n: int, best_of: int, is_stream: bool) -> None:
    """Raise InvalidRequest naming the count that cannot be meant."""
    for name, count in (("n", n), ("best_of", best_of)):
        if not 1 <= count <= MAX_STREAMS:
            raise invalid(name, f"must be in [1, {MAX_STREAMS}], not {count}")
    if best_of < n:
        raise invalid("best_of", f"{best_of} is less than n={n}")
    if best_of > n and is_stream:
        raise invalid("best_of", "must be n in a stream: the best are not known before the end")
    if num_prompts * best_of > MAX_STREAMS:
        name = "best_of" if best_of > n else "n"
        raise invalid(name, f"{num_prompts} prompts of {best_of} choices are more than {MAX_STREAMS}")


def spread(request: GenerationRequest, n: int, best_of: int) -> list[GenerationRequest]:
    """One request for each choice. Choice i has the seed of the request plus i; without one each gets its own."""
    sampling = request.sampling
    if best_of > n and sampling.logprobs is None:
        sampling = dataclasses.replace(sampling, logprobs=0)  # by them the best are found
    first = sampling.seed
    others = dataclasses.replace(sampling, prompt_logprobs=None)  # the first choice has those of the prompt
    seeds = [first if first is None or i == 0 else (first + i) % 2**64 for i in range(best_of)]
    return [
        dataclasses.replace(request, sampling=dataclasses.replace(others if i else sampling, seed=seed))
        for i, seed in enumerate(seeds)
    ]


def best(choices: Sequence[Sequence[Tokens]], n: int) -> list[int]:
    """Indices of the n choices with the greatest mean logprob of their tokens, the best first."""

    def mean(index: int) -> float:
        logprobs = [one.logprob for tokens in choices[index] for one in tokens.logprobs]
        return sum(logprobs) / len(logprobs) if logprobs else float("-inf")

    return sorted(range(len(choices)), key=lambda index: (-mean(index), index))[:n]


def streams_over_one_prompt(
    requests: Sequence[GenerationRequest], begin: Callable[[GenerationRequest], Events]
) -> list[Events]:
    """The requests' streams; those after the first wait until the prompt's blocks are stored."""
    first, *others = (begin(request) for request in requests)
    if not others:
        return [first]
    is_stored = asyncio.Event()
    return [_leading(first, is_stored), *(_following(stream, is_stored) for stream in others)]


async def _leading(stream: Events, is_stored: asyncio.Event) -> Events:
    """Reads ahead up to the second token: whoever reads the streams may want the others' first events before it."""
    ahead: asyncio.Queue[Event | None] = asyncio.Queue()  # None: no more is read ahead

    async def read_ahead() -> None:
        num_tokens = 0
        try:
            while num_tokens < 2 and (event := await anext(stream, None)) is not None:
                num_tokens += len(event.ids) if isinstance(event, Tokens) else 0
                ahead.put_nowait(event)
        finally:
            ahead.put_nowait(None)
            is_stored.set()  # also at a failure, which is only read when all have begun

    async with contextlib.aclosing(stream):
        reader = asyncio.create_task(read_ahead())
        try:
            while (event := await ahead.get()) is not None:
                yield event
            await reader  # raises what ended the stream
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        async for event in stream:
            yield event


async def _following(stream: Events, is_stored: asyncio.Event) -> Events:
    async with contextlib.aclosing(stream):
        await is_stored.wait()
        async for event in stream:
            yield event


async def interleave(streams: Sequence[Events]) -> AsyncGenerator[tuple[int, Event], None]:
    """Events of all streams as they come, each with its stream's index. The first failure ends them all.

    All first events come before any second one.
    """
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as only:
            async for event in only:
                yield 0, event
        return
    # One slot: a stream produces no more than a slow client reads. An exception or None ends a stream.
    queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue(maxsize=1)

    async def pump(index: int, stream: AsyncGenerator[Event, None]) -> None:
        last: Exception | None = None
        try:
            async with contextlib.aclosing(stream):
                async for event in stream:
                    await queue.put((index, event))
                    await have_started.wait()
        except Exception as error:
            last = error
        await queue.put((index, last))

    have_started = asyncio.Event()
    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = num_silent = len(tasks)
        while num_open:
            index, word = await queue.get()
            if isinstance(word, Exception):
                raise word
            if word is None:
                num_open -= 1
            else:
                yield index, word
                if isinstance(word, Started):
                    num_silent -= 1
                    if num_silent == 0:
                        have_started.set()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def best_choices(streams: Sequence[Events], n: int, best_of: int) -> AsyncGenerator[tuple[int, Event], None]:
    """Events of the n best of each best_of streams, when all have ended; as interleave numbers them."""
    seen: list[list[Event]] = [[] for _ in streams]
    async with contextlib.aclosing(interleave(streams)) as events:
        async for index, event in events:
            seen[index].append(event)
    for first in range(0, len(streams), best_of):
        candidates = seen[first : first + best_of]
        tokens = [[event for event in one if isinstance(event, Tokens)] for one in candidates]
        for place, chosen in enumerate(best(tokens, n)):
            prompt = [event for event in candidates[0] if isinstance(event, PromptTokens)] if place == 0 else []
            started, *others = [event for event in candidates[chosen] if not isinstance(event, PromptTokens)]
            for event in (started, *prompt, *others):
                yield first // best_of * n + place, event
