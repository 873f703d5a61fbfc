"""Streams one completion from a router and measures it at the client. Knows nothing of clusters and options."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from switchyard_client import Finished, GenerationClient, GenerationRequest, RequestStats, Started, Target, Tokens


@dataclass(slots=True)
class Completion:
    """One finished stream. Times are seconds as the client saw them."""

    prompt: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    seed: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    ttft_s: float = 0.0
    tokens_per_s: float = 0.0
    """After the first token; 0 when there were not two."""
    stats: RequestStats = field(default_factory=RequestStats)


def complete(target: Target, request: GenerationRequest, on_text: Callable[[str], None]) -> Completion:
    """Stream a completion, telling each piece of text as it comes. Raises switchyard_client.GenerationError."""
    assert isinstance(request.prompt, str)
    completion = Completion(request.prompt)
    began_s = time.monotonic()
    first_s = last_s = began_s
    with GenerationClient(target) as client:
        for event in client.generate(request):
            match event:
                case Started():
                    completion.seed = event.seed
                    completion.num_prompt_tokens = event.num_prompt_tokens
                case Tokens():
                    last_s = time.monotonic()
                    if not completion.token_ids:
                        first_s = last_s
                    completion.token_ids += event.ids
                    completion.text += event.text
                    on_text(event.text)
                case Finished():
                    completion.finish_reason = event.reason.value
                    completion.num_output_tokens = event.num_output_tokens
                    completion.stats = event.stats
    completion.ttft_s = first_s - began_s
    if last_s > first_s:
        completion.tokens_per_s = (len(completion.token_ids) - 1) / (last_s - first_s)
    return completion


def summary(completion: Completion) -> list[str]:
    """What it cost, in a few lines for people."""
    stats = completion.stats
    where = (
        f"prefill on {stats.prefill_worker_id}, decode on {stats.decode_worker_id}"
        if stats.prefill_worker_id != stats.decode_worker_id
        else f"on {stats.decode_worker_id}"
    )
    drafts = []
    if stats.num_drafts:
        length = 1 + stats.num_accepted_tokens / stats.num_drafts
        accepted = f"{stats.num_accepted_tokens} of {stats.num_draft_tokens} accepted"
        drafts.append(f"draft tokens          {accepted}; {length:.2f} tokens a step with drafts")
    return [
        f"time to first token   {completion.ttft_s * 1000:.1f} ms",
        f"tokens per second     {completion.tokens_per_s:.1f}",
        f"tokens                {completion.num_prompt_tokens} prompt, {completion.num_output_tokens} completion",
        *drafts,
        f"KV blocks moved       {stats.num_transferred_blocks} from the prefill to the decode worker",
        f"recomputed at decode  {stats.num_recomputed_prompt_tokens} prompt tokens",
        f"ran                   {where}",
    ]
