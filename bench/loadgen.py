"""Plays requests against a router and measures what clients feel.

Requests are sent when the trace says so, but at most `concurrency` at a time: the time that one waits for its turn is
not in its TTFT. Knows gRPC clients only.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from switchyard_client import Finished, GenerationClient, GenerationError, GenerationRequest, SamplingParams, Tokens

from planner.trace import TraceRequest


@dataclass(frozen=True, slots=True)
class RequestResult:
    """One request as its client saw it; times in seconds. A failed one has an error and no times."""

    ttft_s: float = 0.0
    tpot_s: float = 0.0  # per token after the first
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_recomputed_prompt_tokens: int = 0
    num_transferred_blocks: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a list of seconds."""

    p50_s: float
    p90_s: float
    p99_s: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """Nearest rank; zeros when there are none."""
        ordered = sorted(values) or [0.0]
        pick = [ordered[math.ceil(q * len(ordered)) - 1] for q in (0.5, 0.9, 0.99)]
        return cls(*pick)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """A run's summary."""

    num_requests: int
    num_failed: int
    duration_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    ttft: Percentiles
    tpot: Percentiles
    mean_ttft_s: float
    num_recomputed_prompt_tokens: int
    num_transferred_blocks: int
    errors: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people."""

        def in_ms(name: str, p: Percentiles) -> str:
            return f"{name:14} p50 {p.p50_s * 1e3:.1f}  p90 {p.p90_s * 1e3:.1f}  p99 {p.p99_s * 1e3:.1f} ms"

        return [
            f"{'requests':14} {self.num_requests}, {self.num_failed} failed, in {self.duration_s:.1f} s",
            in_ms("TTFT", self.ttft),
            in_ms("TPOT", self.tpot),
            f"{'output':14} {self.output_tokens_per_s:.1f} tokens/s",
            f"{'prompt':14} {self.prompt_tokens_per_s:.1f} tokens/s",
            f"{'KV blocks':14} {self.num_transferred_blocks} moved",
            f"{'recomputed':14} {self.num_recomputed_prompt_tokens} prompt tokens",
            *(f"{'failed':14} {error}" for error in self.errors),
        ]


def prompt_ids(request: TraceRequest, vocab_size: int, rng: random.Random) -> tuple[int, ...]:
    """Random ids; those of one prefix_id begin alike, over half of the prompt."""
    if request.prefix_id < 0:
        return tuple(rng.randrange(1, vocab_size) for _ in range(request.num_prompt_tokens))
    shared = random.Random(request.prefix_id)
    half = request.num_prompt_tokens // 2
    head = [shared.randrange(1, vocab_size) for _ in range(half)]
    return (*head, *(rng.randrange(1, vocab_size) for _ in range(request.num_prompt_tokens - half)))


async def play(target: str, trace: Sequence[TraceRequest], concurrency: int, seed: int = 0) -> LoadReport:
    """Send the whole trace to the router at `target`; prompts that do not fit the model's context are cut to it."""
    async with GenerationClient(target) as client:
        model = await asyncio.to_thread(lambda: client.models()[0])
        rng = random.Random(seed)
        gate = asyncio.Semaphore(concurrency)
        began_s = time.perf_counter()

        async def one(request: TraceRequest, ids: tuple[int, ...]) -> RequestResult:
            await asyncio.sleep(max(0.0, request.arrival_s - (time.perf_counter() - began_s)))
            async with gate:
                return await _measure(client, ids, request.num_output_tokens)

        tasks = []
        for request in trace:
            max_prompt_tokens = model.context_tokens - request.num_output_tokens - 1
            ids = prompt_ids(request, model.vocab_size, rng)[: max(1, max_prompt_tokens)]
            tasks.append(asyncio.create_task(one(request, ids)))
        results = await asyncio.gather(*tasks)
        return summarize(results, time.perf_counter() - began_s)


async def _measure(client: GenerationClient, ids: tuple[int, ...], num_output_tokens: int) -> RequestResult:
    options = SamplingParams(temperature=0.0, max_tokens=num_output_tokens, ignore_eos=True)
    sent_s = time.perf_counter()
    first_s = last_s = sent_s
    count = 0
    try:
        async for event in client.generate_async(GenerationRequest(ids, options)):
            if isinstance(event, Tokens):
                last_s = time.perf_counter()
                first_s = last_s if count == 0 else first_s
                count += len(event.ids)
            elif isinstance(event, Finished):
                stats = event.stats
                return RequestResult(
                    first_s - sent_s,
                    (last_s - first_s) / max(1, count - 1),
                    len(ids),
                    count,
                    stats.num_recomputed_prompt_tokens,
                    stats.num_transferred_blocks,
                )
    except GenerationError as error:
        return RequestResult(error=str(error))
    return RequestResult(error="the stream ended without a Finished")


def summarize(results: Sequence[RequestResult], duration_s: float) -> LoadReport:
    """The report of a run."""
    good = [r for r in results if not r.error]
    ttft = [r.ttft_s for r in good]
    return LoadReport(
        num_requests=len(results),
        num_failed=len(results) - len(good),
        duration_s=duration_s,
        output_tokens_per_s=sum(r.num_output_tokens for r in good) / duration_s,
        prompt_tokens_per_s=sum(r.num_prompt_tokens for r in good) / duration_s,
        ttft=Percentiles.of(ttft),
        tpot=Percentiles.of([r.tpot_s for r in good if r.num_output_tokens > 1]),
        mean_ttft_s=statistics.fmean(ttft) if ttft else 0.0,
        num_recomputed_prompt_tokens=sum(r.num_recomputed_prompt_tokens for r in good),
        num_transferred_blocks=sum(r.num_transferred_blocks for r in good),
        errors=tuple(sorted({r.error for r in results if r.error})),
    )
