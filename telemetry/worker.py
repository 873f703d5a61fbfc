"""What each worker reports: to its routers in `WorkerLoad`, and to Ray. Fields are those of `WorkerLoad`."""

from __future__ import annotations

from telemetry.buckets import TIME_TO_FIRST_TOKEN
from telemetry.metric import Metric, counter, gauge, seconds

LABELS = ("worker", "pool", "role")
_PREFIX = "switchyard_worker_"


def _count(name: str, unit: str, meaning: str, field: str, *more_labels: str) -> Metric:
    return counter(f"{_PREFIX}{name}_total", unit, meaning, (*LABELS, *more_labels), field)


def _state(name: str, unit: str, meaning: str, field: str = "", *more_labels: str) -> Metric:
    return gauge(f"{_PREFIX}{name}", unit, meaning, (*LABELS, *more_labels), field)


ENGINE = (
    _state("running_requests", "requests", "Requests in the running batch.", "num_running"),
    _state("waiting_requests", "requests", "Requests waiting to join the batch.", "num_waiting"),
    _state("waiting_for_kv_requests", "requests", "Decode requests waiting for KV blocks.", "num_waiting_for_kv"),
    _state("free_blocks", "blocks", "KV blocks that can be allocated now: free or only cached.", "num_free_blocks"),
    _state("queued_tokens", "tokens", "Prompt tokens accepted and not yet computed.", "num_queued_tokens"),
    _count("steps", "", "Engine steps done.", "num_steps"),
    _count("generated_tokens", "tokens", "Tokens generated.", "num_generated_tokens"),
    _count("computed_prompt_tokens", "tokens", "Prompt tokens computed.", "num_computed_prompt_tokens"),
    _count(
        "cached_prompt_tokens",
        "tokens",
        "Prompt tokens taken from the device prefix cache or, but for decode requests, from the tiers.",
        "num_cached_prompt_tokens",
    ),
    _count(
        "recomputed_prompt_tokens",
        "tokens",
        "Prompt tokens computed by decode requests because KV blocks were missing or bad.",
        "num_recomputed_prompt_tokens",
    ),
    _count(
        "dropped_write_back_blocks",
        "blocks",
        "KV blocks for a later turn that were not stored, because the tiers were slower than decoding.",
        "num_dropped_write_backs",
    ),
    _state("transfers", "", "Batches of KV blocks on their way to or from the tiers.", "num_transfers"),
    _count("step_seconds", "seconds", "Time in engine steps.", "step_seconds"),
    _count("step_requests", "requests", "Running requests, added up over the steps.", "step_requests"),
    _count(
        "step_context_tokens",
        "tokens",
        "KV cache that running requests take up, added up over the steps.",
        "step_context_tokens",
    ),
    _count("preemptions", "", "Requests preempted for want of KV blocks.", "num_preemptions"),
    _count("swaps", "", "Preempted requests whose KV went to the tiers, to be pulled again.", "num_swaps"),
    _count("recomputes", "", "Preempted requests whose KV was to be computed again.", "num_recomputes"),
    _count("published_blocks", "blocks", "KV blocks published.", "num_published_blocks"),
    _count("transferred_blocks", "blocks", "KV blocks pulled, verified and used.", "num_transferred_blocks"),
    _count(
        "prefixes_fetched",
        "",
        "Prefixes that only the tiers had and that were pulled, because that was cheaper.",
        "num_prefixes_fetched",
    ),
    _count(
        "prefixes_recomputed",
        "",
        "Prefixes that only the tiers had and that were computed again, because that was cheaper.",
        "num_prefixes_recomputed",
    ),
)
"""On Ray's metrics port and on each router's /metrics."""

SPECULATION = (
    _count("spec_decode_num_drafts", "", "Runs of draft tokens that were judged.", "num_drafts"),
    _count("spec_decode_num_draft_tokens", "tokens", "Draft tokens that were judged.", "num_draft_tokens"),
    _count(
        "spec_decode_num_accepted_tokens", "tokens", "Draft tokens that the model chose, too.", "num_accepted_tokens"
    ),
    _count(
        "spec_decode_num_accepted_tokens_per_pos",
        "",
        "Accepted tokens by position in the draft.",
        "num_accepted_tokens_per_pos",
        "position",
    ),
    _count("spec_decode_drafting_seconds", "seconds", "Time in proposing draft tokens.", "drafting_seconds"),
    _state(
        "spec_decode_saved_seconds",
        "seconds",
        "Time that drafts have saved since the start, by measured times of steps without; negative: they cost time.",
        "saved_seconds",
    ),
)
"""On each router's /metrics. The mean acceptance length is 1 + accepted tokens / drafts."""

DEMAND = (
    _count("requests", "requests", "Requests that came.", "num_requests"),
    _count("prompt_tokens", "tokens", "Tokens of the prompts that came.", "num_prompt_tokens"),
    _count("ended_requests", "requests", "Requests that ended here.", "num_ended_requests"),
    _count(
        "ended_uncached_tokens",
        "tokens",
        "Computed prompt tokens of the requests that ended here.",
        "num_ended_uncached_tokens",
    ),
    _count("ended_output_tokens", "tokens", "Tokens that ended requests got here.", "num_ended_output_tokens"),
    _count(
        "uncached_tokens_squared",
        "",
        "Squares of the computed prompt tokens of each request that ended here.",
        "uncached_tokens_squared",
    ),
    _count("kv_wait_requests", "requests", "Requests that waited for KV blocks of another worker.", "num_kv_waits"),
    _count("kv_wait_seconds", "seconds", "From the end of their prefill to their first step here.", "kv_wait_seconds"),
    _count(
        "moved_requests",
        "requests",
        "Requests moved to other workers because a drain took too long.",
        "num_moved_streams",
    ),
)
"""On Ray's metrics port and on each router's /metrics: what autoscaling goes by, and what a drain cost."""

TIME_TO_FIRST = seconds(
    f"{_PREFIX}time_to_first_token_seconds",
    "From a request's arrival at this worker to its first token.",
    TIME_TO_FIRST_TOKEN,
    LABELS,
    "ttft_s",
)

STORE = (
    _count("rejected_fragments", "fragments", "KV fragments rejected.", "num_rejected_fragments", "reason"),
    _count("pulled_bytes", "bytes", "KV pulled.", "pulled_bytes", "tier"),
    _count("published_bytes", "bytes", "KV published.", "published_bytes", "tier"),
    _count(
        "prefetched_fragments",
        "fragments",
        "KV fragments brought to the host for queued requests.",
        "num_prefetched_fragments",
        "tier",
    ),
    _count("prefetched_bytes", "bytes", "Their size.", "prefetched_bytes", "tier"),
    _count(
        "useless_prefetched_fragments",
        "fragments",
        "KV fragments prefetched for requests that did not use them.",
        "num_useless_prefetched_fragments",
    ),
    _state("tier_up", "", "1 while a tier answers.", "tier_is_up", "tier"),
)
"""On each router's /metrics; of rank 0 alone."""

ADAPTERS = (
    _state("adapter_slots", "slots", "Adapters that fit the device; 0 where it takes none.", "num_adapter_slots"),
    _count(
        "adapter_hits", "", "Requests whose adapter was on the device when they were first run.", "num_adapter_hits"
    ),
    _count("adapter_copies", "", "Adapters copied to the device.", "num_adapter_copies"),
    _count("adapter_reads", "", "Adapters read from files.", "num_adapter_reads"),
    _count("adapter_failures", "", "Adapters that could not be read, or do not fit the model.", "num_failed_adapters"),
    _state("waiting_for_adapter_requests", "requests", "Requests waiting for an adapter.", "num_waiting_for_adapter"),
)
"""On each router's /metrics."""

TIER_OK = _state("tier_ok", "", "1 while a tier does all that it should; /readyz says why not.", "", "tier")
UP = _state("up", "", "1 for each worker that takes requests.")
KNOWN_BLOCKS = _state("known_blocks", "blocks", "KV blocks that the worker said it holds; absent while guessed.")
RESIDENT_ADAPTERS = _state("resident_adapters", "adapters", "Adapters that it holds, by where.", "", "memory")
"""memory: device, or host for those that are in host memory alone. Absent where a worker takes no adapters."""

RAY_METRICS = (*ENGINE, *DEMAND, TIME_TO_FIRST)
"""On Ray's metrics port."""

ROUTER_METRICS = (*ENGINE, *SPECULATION, *DEMAND, *STORE, *ADAPTERS, TIER_OK, UP, KNOWN_BLOCKS, RESIDENT_ADAPTERS)
"""On each router's /metrics, from the worker's last load report."""
