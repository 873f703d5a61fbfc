from switchyard.v1 import adapter_pb2 as _adapter_pb2
from switchyard.v1 import generation_pb2 as _generation_pb2
from switchyard.v1 import identity_pb2 as _identity_pb2
from switchyard.v1 import worker_load_pb2 as _worker_load_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union
from switchyard.v1.worker_load_pb2 import WorkerLoad as WorkerLoad

DESCRIPTOR: _descriptor.FileDescriptor

class RequestRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REQUEST_ROLE_UNSPECIFIED: _ClassVar[RequestRole]
    REQUEST_ROLE_MIXED: _ClassVar[RequestRole]
    REQUEST_ROLE_PREFILL: _ClassVar[RequestRole]
    REQUEST_ROLE_DECODE: _ClassVar[RequestRole]
    REQUEST_ROLE_EMBED: _ClassVar[RequestRole]

class WorkerRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_ROLE_UNSPECIFIED: _ClassVar[WorkerRole]
    WORKER_ROLE_MIXED: _ClassVar[WorkerRole]
    WORKER_ROLE_PREFILL: _ClassVar[WorkerRole]
    WORKER_ROLE_DECODE: _ClassVar[WorkerRole]

class RequestOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REQUEST_OUTCOME_UNSPECIFIED: _ClassVar[RequestOutcome]
    REQUEST_OUTCOME_STOP: _ClassVar[RequestOutcome]
    REQUEST_OUTCOME_LENGTH: _ClassVar[RequestOutcome]
    REQUEST_OUTCOME_CANCELLED: _ClassVar[RequestOutcome]
    REQUEST_OUTCOME_PREFILLED: _ClassVar[RequestOutcome]
    REQUEST_OUTCOME_FAILED: _ClassVar[RequestOutcome]
    REQUEST_OUTCOME_STEP_FAILED: _ClassVar[RequestOutcome]
    REQUEST_OUTCOME_ADAPTER_FAILED: _ClassVar[RequestOutcome]

class WorkerPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_PHASE_UNSPECIFIED: _ClassVar[WorkerPhase]
    WORKER_PHASE_READY: _ClassVar[WorkerPhase]
    WORKER_PHASE_DRAINING: _ClassVar[WorkerPhase]
    WORKER_PHASE_DRAINED: _ClassVar[WorkerPhase]
    WORKER_PHASE_SWITCHED: _ClassVar[WorkerPhase]
REQUEST_ROLE_UNSPECIFIED: RequestRole
REQUEST_ROLE_MIXED: RequestRole
REQUEST_ROLE_PREFILL: RequestRole
REQUEST_ROLE_DECODE: RequestRole
REQUEST_ROLE_EMBED: RequestRole
WORKER_ROLE_UNSPECIFIED: WorkerRole
WORKER_ROLE_MIXED: WorkerRole
WORKER_ROLE_PREFILL: WorkerRole
WORKER_ROLE_DECODE: WorkerRole
REQUEST_OUTCOME_UNSPECIFIED: RequestOutcome
REQUEST_OUTCOME_STOP: RequestOutcome
REQUEST_OUTCOME_LENGTH: RequestOutcome
REQUEST_OUTCOME_CANCELLED: RequestOutcome
REQUEST_OUTCOME_PREFILLED: RequestOutcome
REQUEST_OUTCOME_FAILED: RequestOutcome
REQUEST_OUTCOME_STEP_FAILED: RequestOutcome
REQUEST_OUTCOME_ADAPTER_FAILED: RequestOutcome
WORKER_PHASE_UNSPECIFIED: WorkerPhase
WORKER_PHASE_READY: WorkerPhase
WORKER_PHASE_DRAINING: WorkerPhase
WORKER_PHASE_DRAINED: WorkerPhase
WORKER_PHASE_SWITCHED: WorkerPhase

class ConnectRequest(_message.Message):
    __slots__ = ("hello", "submit", "cancel", "credit", "ping", "retired_seen", "pin_adapters")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    CONTINUE_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    RETIRED_SEEN_FIELD_NUMBER: _ClassVar[int]
    PIN_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    hello: RouterHello
    submit: Submit
    cancel: Cancel
    credit: Credit
    ping: Ping
    retired_seen: RetiredSeen
    pin_adapters: _adapter_pb2.PinAdapters
    def __init__(self, hello: _Optional[_Union[RouterHello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., retired_seen: _Optional[_Union[RetiredSeen, _Mapping]] = ..., pin_adapters: _Optional[_Union[_adapter_pb2.PinAdapters, _Mapping]] = ..., **kwargs) -> None: ...

class RouterHello(_message.Message):
    __slots__ = ("router_id", "epoch", "served")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    epoch: int
    served: _identity_pb2.ServedModel
    def __init__(self, router_id: _Optional[str] = ..., epoch: _Optional[int] = ..., served: _Optional[_Union[_identity_pb2.ServedModel, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("stream_id", "epoch", "role", "token_ids", "num_prompt_tokens", "sampling", "window_tokens", "deadline_s", "tenant_salt", "priority", "tenant", "pooling", "adapter")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    WINDOW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    TENANT_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    epoch: int
    role: RequestRole
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_prompt_tokens: int
    sampling: _generation_pb2.SamplingParams
    window_tokens: int
    deadline_s: float
    tenant_salt: bytes
    priority: int
    tenant: bytes
    pooling: _generation_pb2.Pooling
    adapter: _adapter_pb2.Adapter
    def __init__(self, stream_id: _Optional[str] = ..., epoch: _Optional[int] = ..., role: _Optional[_Union[RequestRole, str]] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_generation_pb2.SamplingParams, _Mapping]] = ..., window_tokens: _Optional[int] = ..., deadline_s: _Optional[float] = ..., tenant_salt: _Optional[bytes] = ..., priority: _Optional[int] = ..., tenant: _Optional[bytes] = ..., pooling: _Optional[_Union[_generation_pb2.Pooling, str]] = ..., adapter: _Optional[_Union[_adapter_pb2.Adapter, _Mapping]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("stream_id",)
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    def __init__(self, stream_id: _Optional[str] = ...) -> None: ...

class Continue(_message.Message):
    __slots__ = ("stream_id", "token_ids")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, stream_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("stream_id", "num_tokens")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    num_tokens: int
    def __init__(self, stream_id: _Optional[str] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class RetiredSeen(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ConnectResponse(_message.Message):
    __slots__ = ("hello", "tokens", "finished", "load", "pong", "retired", "prompt_logprobs")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    RETIRED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    hello: WorkerHello
    tokens: TokenBatch
    finished: RequestFinished
    load: _worker_load_pb2.WorkerLoad
    pong: Pong
    retired: Retired
    prompt_logprobs: PartPromptLogprobs
    def __init__(self, hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., tokens: _Optional[_Union[TokenBatch, _Mapping]] = ..., finished: _Optional[_Union[RequestFinished, _Mapping]] = ..., load: _Optional[_Union[_worker_load_pb2.WorkerLoad, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., retired: _Optional[_Union[Retired, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[PartPromptLogprobs, _Mapping]] = ...) -> None: ...

class PartPromptLogprobs(_message.Message):
    __slots__ = ("stream_id", "epoch", "first_position", "logprobs")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    epoch: int
    first_position: int
    logprobs: _containers.RepeatedCompositeFieldContainer[_generation_pb2.TokenLogprobs]
    def __init__(self, stream_id: _Optional[str] = ..., epoch: _Optional[int] = ..., first_position: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[_generation_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class Retired(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("worker_id", "role", "model", "num_blocks", "block_size", "kv_fingerprint", "tensor_parallel_size", "pipeline_parallel_size", "lease_epoch", "served")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    LEASE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: WorkerRole
    model: _generation_pb2.ModelInfo
    num_blocks: int
    block_size: int
    kv_fingerprint: bytes
    tensor_parallel_size: int
    pipeline_parallel_size: int
    lease_epoch: int
    served: _identity_pb2.ServedModel
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[WorkerRole, str]] = ..., model: _Optional[_Union[_generation_pb2.ModelInfo, _Mapping]] = ..., num_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., kv_fingerprint: _Optional[bytes] = ..., tensor_parallel_size: _Optional[int] = ..., pipeline_parallel_size: _Optional[int] = ..., lease_epoch: _Optional[int] = ..., served: _Optional[_Union[_identity_pb2.ServedModel, _Mapping]] = ...) -> None: ...

class TokenBatch(_message.Message):
    __slots__ = ("stream_ids", "epochs", "stream_index", "positions", "token_ids", "logprob_index", "logprobs")
    STREAM_IDS_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    STREAM_INDEX_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_INDEX_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    stream_ids: _containers.RepeatedScalarFieldContainer[str]
    epochs: _containers.RepeatedScalarFieldContainer[int]
    stream_index: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprob_index: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_generation_pb2.TokenLogprobs]
    def __init__(self, stream_ids: _Optional[_Iterable[str]] = ..., epochs: _Optional[_Iterable[int]] = ..., stream_index: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprob_index: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_generation_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class RequestFinished(_message.Message):
    __slots__ = ("stream_id", "epoch", "outcome", "error", "is_invalid_request", "num_cached_prompt_tokens", "num_computed_prompt_tokens", "num_transferred_blocks", "num_published_blocks", "times", "embedding", "num_draft_tokens", "num_accepted_tokens", "num_drafts")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    IS_INVALID_REQUEST_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_TRANSFERRED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_PUBLISHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    epoch: int
    outcome: RequestOutcome
    error: str
    is_invalid_request: bool
    num_cached_prompt_tokens: int
    num_computed_prompt_tokens: int
    num_transferred_blocks: int
    num_published_blocks: int
    times: PartTimes
    embedding: _containers.RepeatedScalarFieldContainer[float]
    num_draft_tokens: int
    num_accepted_tokens: int
    num_drafts: int
    def __init__(self, stream_id: _Optional[str] = ..., epoch: _Optional[int] = ..., outcome: _Optional[_Union[RequestOutcome, str]] = ..., error: _Optional[str] = ..., is_invalid_request: bool = ..., num_cached_prompt_tokens: _Optional[int] = ..., num_computed_prompt_tokens: _Optional[int] = ..., num_transferred_blocks: _Optional[int] = ..., num_published_blocks: _Optional[int] = ..., times: _Optional[_Union[PartTimes, _Mapping]] = ..., embedding: _Optional[_Iterable[float]] = ..., num_draft_tokens: _Optional[int] = ..., num_accepted_tokens: _Optional[int] = ..., num_drafts: _Optional[int] = ...) -> None: ...

class PartTimes(_message.Message):
    __slots__ = ("continued_s", "first_step_s", "first_token_s")
    CONTINUED_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    continued_s: float
    first_step_s: float
    first_token_s: float
    def __init__(self, continued_s: _Optional[float] = ..., first_step_s: _Optional[float] = ..., first_token_s: _Optional[float] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("phase", "pool", "role", "lease_epoch", "num_requests", "age_seconds")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    LEASE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    phase: WorkerPhase
    pool: str
    role: WorkerRole
    lease_epoch: int
    num_requests: int
    age_seconds: float
    def __init__(self, phase: _Optional[_Union[WorkerPhase, str]] = ..., pool: _Optional[str] = ..., role: _Optional[_Union[WorkerRole, str]] = ..., lease_epoch: _Optional[int] = ..., num_requests: _Optional[int] = ..., age_seconds: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class SwitchRoleRequest(_message.Message):
    __slots__ = ("pool", "role")
    POOL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    pool: str
    role: WorkerRole
    def __init__(self, pool: _Optional[str] = ..., role: _Optional[_Union[WorkerRole, str]] = ...) -> None: ...

class AnnounceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchBlocksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchBlocksResponse(_message.Message):
    __slots__ = ("snapshot", "changes")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    snapshot: BlockSnapshotPart
    changes: BlockChanges
    def __init__(self, snapshot: _Optional[_Union[BlockSnapshotPart, _Mapping]] = ..., changes: _Optional[_Union[BlockChanges, _Mapping]] = ...) -> None: ...

class BlockSnapshotPart(_message.Message):
    __slots__ = ("worker_id", "sequence", "part", "is_last", "names")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    sequence: int
    part: int
    is_last: bool
    names: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, worker_id: _Optional[str] = ..., sequence: _Optional[int] = ..., part: _Optional[int] = ..., is_last: bool = ..., names: _Optional[_Iterable[bytes]] = ...) -> None: ...

class BlockChanges(_message.Message):
    __slots__ = ("after", "sequence", "stored", "removed")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    after: int
    sequence: int
    stored: _containers.RepeatedScalarFieldContainer[bytes]
    removed: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, after: _Optional[int] = ..., sequence: _Optional[int] = ..., stored: _Optional[_Iterable[bytes]] = ..., removed: _Optional[_Iterable[bytes]] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("worker", "load", "status")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerHello
    load: _worker_load_pb2.WorkerLoad
    status: WorkerStatus
    def __init__(self, worker: _Optional[_Union[WorkerHello, _Mapping]] = ..., load: _Optional[_Union[_worker_load_pb2.WorkerLoad, _Mapping]] = ..., status: _Optional[_Union[WorkerStatus, _Mapping]] = ...) -> None: ...
