"""What was asked of a worker since its start: counters by which its pool is sized."""

from __future__ import annotations

from dataclasses import dataclass

from workers.engine.request import Request, RequestEnd


@dataclass(slots=True)
class Demand:
    """Fields are those of WorkerLoad. For the server's loop."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_ended_requests: int = 0
    num_ended_uncached_tokens: int = 0
    num_ended_output_tokens: int = 0
    uncached_tokens_squared: float = 0.0
    num_kv_waits: int = 0
    kv_wait_seconds: float = 0.0
    num_moved_streams: int = 0

    def came(self, request: Request) -> None:
        """A router sent it."""
        self.num_requests += 1
        self.num_prompt_tokens += request.num_tokens

    def ended(self, end: RequestEnd) -> None:
        """The engine is through with it."""
        self.num_ended_requests += 1
        self.num_ended_uncached_tokens += end.num_computed_prompt_tokens
        self.num_ended_output_tokens += end.num_generated_tokens
        self.uncached_tokens_squared += float(end.num_computed_prompt_tokens) ** 2
        if end.continued_time_s is not None and end.first_step_time_s is not None:
            self.num_kv_waits += 1
            self.kv_wait_seconds += max(0.0, end.first_step_time_s - end.continued_time_s)
