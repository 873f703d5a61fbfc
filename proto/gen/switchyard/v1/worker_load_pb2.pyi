from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerLoad(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_waiting_for_kv", "num_free_blocks", "num_queued_tokens", "num_steps", "num_computed_prompt_tokens", "num_cached_prompt_tokens", "num_recomputed_prompt_tokens", "num_generated_tokens", "num_preemptions", "num_published_blocks", "num_transferred_blocks", "num_rejected_fragments", "pulled_bytes", "published_bytes", "tier_is_up", "num_prefixes_fetched", "num_prefixes_recomputed", "num_prefetched_fragments", "prefetched_bytes", "num_useless_prefetched_fragments", "tier_problems", "num_dropped_write_backs", "num_transfers", "num_requests", "num_prompt_tokens", "num_ended_requests", "uncached_tokens_squared", "num_kv_waits", "kv_wait_seconds", "num_moved_streams", "step_seconds", "step_requests", "step_context_tokens", "num_ended_uncached_tokens", "num_ended_output_tokens", "num_swaps", "num_recomputes", "num_adapter_slots", "device_adapters", "host_adapters", "num_adapter_hits", "num_adapter_copies", "num_adapter_reads", "num_failed_adapters", "num_waiting_for_adapter", "num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos", "drafting_seconds", "saved_seconds")
    class NumRejectedFragmentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class PulledBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class PublishedBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class TierIsUpEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bool
        def __init__(self, key: _Optional[str] = ..., value: bool = ...) -> None: ...
    class NumPrefetchedFragmentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class PrefetchedBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class TierProblemsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class NumAcceptedTokensPerPosEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FOR_KV_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_RECOMPUTED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_PUBLISHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_TRANSFERRED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_REJECTED_FRAGMENTS_FIELD_NUMBER: _ClassVar[int]
    PULLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIER_IS_UP_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIXES_FETCHED_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIXES_RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFETCHED_FRAGMENTS_FIELD_NUMBER: _ClassVar[int]
    PREFETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_USELESS_PREFETCHED_FRAGMENTS_FIELD_NUMBER: _ClassVar[int]
    TIER_PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    NUM_DROPPED_WRITE_BACKS_FIELD_NUMBER: _ClassVar[int]
    NUM_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ENDED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    UNCACHED_TOKENS_SQUARED_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_WAITS_FIELD_NUMBER: _ClassVar[int]
    KV_WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    NUM_MOVED_STREAMS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEP_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    STEP_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ENDED_UNCACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ENDED_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_SWAPS_FIELD_NUMBER: _ClassVar[int]
    NUM_RECOMPUTES_FIELD_NUMBER: _ClassVar[int]
    NUM_ADAPTER_SLOTS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    HOST_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NUM_ADAPTER_HITS_FIELD_NUMBER: _ClassVar[int]
    NUM_ADAPTER_COPIES_FIELD_NUMBER: _ClassVar[int]
    NUM_ADAPTER_READS_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FOR_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_TOKENS_PER_POS_FIELD_NUMBER: _ClassVar[int]
    DRAFTING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SAVED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_waiting_for_kv: int
    num_free_blocks: int
    num_queued_tokens: int
    num_steps: int
    num_computed_prompt_tokens: int
    num_cached_prompt_tokens: int
    num_recomputed_prompt_tokens: int
    num_generated_tokens: int
    num_preemptions: int
    num_published_blocks: int
    num_transferred_blocks: int
    num_rejected_fragments: _containers.ScalarMap[str, int]
    pulled_bytes: _containers.ScalarMap[str, int]
    published_bytes: _containers.ScalarMap[str, int]
    tier_is_up: _containers.ScalarMap[str, bool]
    num_prefixes_fetched: int
    num_prefixes_recomputed: int
    num_prefetched_fragments: _containers.ScalarMap[str, int]
    prefetched_bytes: _containers.ScalarMap[str, int]
    num_useless_prefetched_fragments: int
    tier_problems: _containers.ScalarMap[str, str]
    num_dropped_write_backs: int
    num_transfers: int
    num_requests: int
    num_prompt_tokens: int
    num_ended_requests: int
    uncached_tokens_squared: float
    num_kv_waits: int
    kv_wait_seconds: float
    num_moved_streams: int
    step_seconds: float
    step_requests: int
    step_context_tokens: int
    num_ended_uncached_tokens: int
    num_ended_output_tokens: int
    num_swaps: int
    num_recomputes: int
    num_adapter_slots: int
    device_adapters: _containers.RepeatedScalarFieldContainer[bytes]
    host_adapters: _containers.RepeatedScalarFieldContainer[bytes]
    num_adapter_hits: int
    num_adapter_copies: int
    num_adapter_reads: int
    num_failed_adapters: int
    num_waiting_for_adapter: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: _containers.ScalarMap[str, int]
    drafting_seconds: float
    saved_seconds: float
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_waiting_for_kv: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., num_queued_tokens: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_computed_prompt_tokens: _Optional[int] = ..., num_cached_prompt_tokens: _Optional[int] = ..., num_recomputed_prompt_tokens: _Optional[int] = ..., num_generated_tokens: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., num_published_blocks: _Optional[int] = ..., num_transferred_blocks: _Optional[int] = ..., num_rejected_fragments: _Optional[_Mapping[str, int]] = ..., pulled_bytes: _Optional[_Mapping[str, int]] = ..., published_bytes: _Optional[_Mapping[str, int]] = ..., tier_is_up: _Optional[_Mapping[str, bool]] = ..., num_prefixes_fetched: _Optional[int] = ..., num_prefixes_recomputed: _Optional[int] = ..., num_prefetched_fragments: _Optional[_Mapping[str, int]] = ..., prefetched_bytes: _Optional[_Mapping[str, int]] = ..., num_useless_prefetched_fragments: _Optional[int] = ..., tier_problems: _Optional[_Mapping[str, str]] = ..., num_dropped_write_backs: _Optional[int] = ..., num_transfers: _Optional[int] = ..., num_requests: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., num_ended_requests: _Optional[int] = ..., uncached_tokens_squared: _Optional[float] = ..., num_kv_waits: _Optional[int] = ..., kv_wait_seconds: _Optional[float] = ..., num_moved_streams: _Optional[int] = ..., step_seconds: _Optional[float] = ..., step_requests: _Optional[int] = ..., step_context_tokens: _Optional[int] = ..., num_ended_uncached_tokens: _Optional[int] = ..., num_ended_output_tokens: _Optional[int] = ..., num_swaps: _Optional[int] = ..., num_recomputes: _Optional[int] = ..., num_adapter_slots: _Optional[int] = ..., device_adapters: _Optional[_Iterable[bytes]] = ..., host_adapters: _Optional[_Iterable[bytes]] = ..., num_adapter_hits: _Optional[int] = ..., num_adapter_copies: _Optional[int] = ..., num_adapter_reads: _Optional[int] = ..., num_failed_adapters: _Optional[int] = ..., num_waiting_for_adapter: _Optional[int] = ..., num_drafts: _Optional[int] = ..., num_draft_tokens: _Optional[int] = ..., num_accepted_tokens: _Optional[int] = ..., num_accepted_tokens_per_pos: _Optional[_Mapping[str, int]] = ..., drafting_seconds: _Optional[float] = ..., saved_seconds: _Optional[float] = ...) -> None: ...
