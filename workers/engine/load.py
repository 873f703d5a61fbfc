"""What an engine has to do and has done, for routers and metrics. Fields are those of WorkerLoad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workers.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class LoadSnapshot:
    """The engine's load after its last step."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_for_kv: int = 0
    num_free_blocks: int = 0
    num_queued_tokens: int = 0
    num_steps: int = 0
    num_computed_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_recomputed_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_swaps: int = 0
    num_recomputes: int = 0
    num_published_blocks: int = 0
    num_transferred_blocks: int = 0
    num_prefixes_fetched: int = 0
    num_prefixes_recomputed: int = 0
    num_dropped_write_backs: int = 0
    num_transfers: int = 0
    step_seconds: float = 0.0
    step_requests: int = 0
    step_context_tokens: int = 0
    num_adapter_slots: int = 0
    device_adapters: Sequence[bytes] = ()
    host_adapters: Sequence[bytes] = ()
    num_adapter_hits: int = 0
    num_adapter_copies: int = 0
    num_adapter_reads: int = 0
    num_failed_adapters: int = 0
    num_waiting_for_adapter: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: Mapping[str, int] = field(default_factory=dict)
    drafting_seconds: float = 0.0
    saved_seconds: float = 0.0


def snapshot(engine: Engine) -> LoadSnapshot:
    """Between two steps."""
    scheduler, counters = engine.scheduler, engine.counters
    adapters = scheduler.adapters
    return LoadSnapshot(
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        num_waiting_for_kv=len(scheduler.waiting_for_kv),
        num_free_blocks=scheduler.pool.num_free,
        num_queued_tokens=scheduler.queues.num_queued_tokens,
        num_steps=counters.num_steps,
        num_computed_prompt_tokens=counters.num_computed_prompt_tokens,
        num_cached_prompt_tokens=counters.num_cached_prompt_tokens,
        num_recomputed_prompt_tokens=scheduler.num_recomputed_prompt_tokens,
        num_generated_tokens=counters.num_generated_tokens,
        num_preemptions=scheduler.num_preemptions,
        num_swaps=scheduler.preemption.num_swaps,
        num_recomputes=scheduler.preemption.num_recomputes,
        num_published_blocks=counters.num_published_blocks,
        num_transferred_blocks=counters.num_transferred_blocks,
        num_prefixes_fetched=scheduler.num_prefixes_fetched,
        num_prefixes_recomputed=scheduler.num_prefixes_recomputed,
        num_dropped_write_backs=scheduler.stores.num_dropped_write_backs,
        num_transfers=scheduler.transfers.num_transfers,
        step_seconds=counters.step_seconds,
        step_requests=counters.step_requests,
        step_context_tokens=counters.step_context_tokens,
        num_adapter_slots=adapters.limits.num_slots,
        device_adapters=adapters.on_device(),
        host_adapters=adapters.in_host_memory(),
        num_adapter_hits=adapters.num_hits,
        num_adapter_copies=adapters.num_copies,
        num_adapter_reads=adapters.num_reads,
        num_failed_adapters=adapters.num_failed,
        num_waiting_for_adapter=adapters.num_waiting,
        **_speculation(engine),
    )


def _speculation(engine: Engine) -> dict[str, Any]:
    if engine.speculation is None:
        return {}
    counters = engine.speculation.counters
    return {
        "num_drafts": counters.num_drafts,
        "num_draft_tokens": counters.num_draft_tokens,
        "num_accepted_tokens": counters.num_accepted_tokens,
        "num_accepted_tokens_per_pos": {str(i): n for i, n in enumerate(counters.num_accepted_tokens_per_pos)},
        "drafting_seconds": counters.drafting_seconds,
        "saved_seconds": counters.saved_seconds,
    }
