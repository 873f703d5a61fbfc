"""What each router counts of its own requests and streams."""

from __future__ import annotations

from telemetry.buckets import REQUEST_DURATION, TIME_PER_OUTPUT_TOKEN, TIME_TO_FIRST_TOKEN, WAIT
from telemetry.metric import counter, gauge, seconds

_USAGE = "gen_ai.client.token.usage"

REQUESTS = counter("switchyard_requests_total", "requests", "Requests ended, by outcome.", ("outcome",))
FAILURES = (
    "internal_error",
    "step_failed",
    "overloaded",
    "unavailable",
    "no_worker",
    "workers_lost",
    "journal_away",
    "deadline_exceeded",
)
"""Outcomes that are the cluster's fault. Each is shown from the start: a rate misses the first count of a series."""
INFLIGHT_REQUESTS = gauge("switchyard_inflight_requests", "requests", "Requests admitted and not ended.")
PROMPT_TOKENS = counter(
    "switchyard_prompt_tokens_total",
    "tokens",
    "Prompt tokens of requests ended.",
    otel=f"the sum of {_USAGE} where gen_ai.token.type is input",
)
OUTPUT_TOKENS = counter(
    "switchyard_output_tokens_total",
    "tokens",
    "Tokens given to clients.",
    otel=f"the sum of {_USAGE} where gen_ai.token.type is output",
)
TIME_TO_FIRST = seconds(
    "switchyard_time_to_first_token_seconds",
    "From a request's arrival to its first token.",
    TIME_TO_FIRST_TOKEN,
    otel="gen_ai.server.time_to_first_token",
)
PREDICTED_TIME_TO_FIRST = seconds(
    "switchyard_predicted_time_to_first_token_seconds",
    "What the placement predicted for it.",
    TIME_TO_FIRST_TOKEN,
)
TIME_PER_OUTPUT = seconds(
    "switchyard_time_per_output_token_seconds",
    "Between a request's tokens after the first one, the mean of each request.",
    TIME_PER_OUTPUT_TOKEN,
    otel="gen_ai.server.time_per_output_token",
)
DURATION = seconds(
    "switchyard_request_duration_seconds",
    "From a request's arrival to its end, of requests that were served.",
    REQUEST_DURATION,
    otel="gen_ai.server.request.duration",
)
QUEUE = seconds("switchyard_queue_seconds", "From a request's arrival to its first placement.", WAIT)
PLACEMENTS = counter(
    "switchyard_placements_total", "", "First placements, by kind: whole or prefill_decode.", ("kind",)
)
REPLACEMENTS = counter("switchyard_replacements_total", "", "Streams placed anew after losing a worker.")
RESUMED_STREAMS = counter("switchyard_resumed_streams_total", "streams", "Streams that a client came back for.")
DROPPED_FRAMES = counter(
    "switchyard_dropped_frames_total", "frames", "Token frames dropped: of an old epoch, or received twice."
)
KV_TRANSFER = seconds(
    "switchyard_kv_transfer_seconds", "From the end of a prefill's last chunk to its decode worker's first step.", WAIT
)
KV_TRANSFER_RELAY = seconds(
    "switchyard_kv_transfer_relay_seconds",
    "The part of a KV transfer until the decode worker's engine got the router's message to continue.",
    WAIT,
)
BLOCK_SNAPSHOTS = counter("switchyard_block_snapshots_total", "", "Lists of all the blocks that a worker holds.")
BLOCK_GAPS = counter("switchyard_block_gaps_total", "", "Times that changes of a worker's blocks were missed.")
MAX_ADAPTER_LABELS = 100
"""Adapters that requests are counted apart for: the first ones that were asked for. The others are counted together."""
OTHER_ADAPTERS = "other"
ADAPTER_REQUESTS = counter(
    "switchyard_adapter_requests_total",
    "requests",
    f"Requests with an adapter that ended, by adapter; those of more than {MAX_ADAPTER_LABELS} as {OTHER_ADAPTERS}.",
    ("adapter",),
)
ADAPTER_LOADS = counter(
    "switchyard_adapter_loads_total",
    "",
    "Calls to load an adapter, by outcome: loaded, or the code of the error.",
    ("outcome",),
)
ADAPTERS = gauge("switchyard_adapters", "adapters", "Adapters that requests can name.")
ADAPTER_REGISTRY_UP = gauge("switchyard_adapter_registry_up", "", "1 while it is known which adapters are served.")
DIRECTORY_UP = gauge("switchyard_directory_up", "", "1 while the directory answers.")
JOURNAL_UP = gauge("switchyard_journal_up", "", "1 while streams can be resumed.")

METRICS = (
    REQUESTS,
    INFLIGHT_REQUESTS,
    PROMPT_TOKENS,
    OUTPUT_TOKENS,
    TIME_TO_FIRST,
    PREDICTED_TIME_TO_FIRST,
    TIME_PER_OUTPUT,
    DURATION,
    QUEUE,
    PLACEMENTS,
    REPLACEMENTS,
    RESUMED_STREAMS,
    DROPPED_FRAMES,
    KV_TRANSFER,
    KV_TRANSFER_RELAY,
    BLOCK_SNAPSHOTS,
    BLOCK_GAPS,
    ADAPTER_REQUESTS,
    ADAPTER_LOADS,
    ADAPTERS,
    ADAPTER_REGISTRY_UP,
    DIRECTORY_UP,
    JOURNAL_UP,
)
"""On each router's /metrics."""
