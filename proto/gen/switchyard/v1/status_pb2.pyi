from switchyard.v1 import worker_pb2 as _worker_pb2
from switchyard.v1 import worker_load_pb2 as _worker_load_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ("num_decisions",)
    NUM_DECISIONS_FIELD_NUMBER: _ClassVar[int]
    num_decisions: int
    def __init__(self, num_decisions: _Optional[int] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("cluster", "model", "is_ready", "is_degraded", "directory_is_up", "streams_can_resume", "num_inflight_requests", "workers", "workers_refused", "decisions")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IS_READY_FIELD_NUMBER: _ClassVar[int]
    IS_DEGRADED_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_IS_UP_FIELD_NUMBER: _ClassVar[int]
    STREAMS_CAN_RESUME_FIELD_NUMBER: _ClassVar[int]
    NUM_INFLIGHT_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_REFUSED_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    model: str
    is_ready: bool
    is_degraded: bool
    directory_is_up: bool
    streams_can_resume: bool
    num_inflight_requests: int
    workers: _containers.RepeatedCompositeFieldContainer[ListedWorker]
    workers_refused: _containers.RepeatedCompositeFieldContainer[RefusedWorker]
    decisions: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, cluster: _Optional[str] = ..., model: _Optional[str] = ..., is_ready: bool = ..., is_degraded: bool = ..., directory_is_up: bool = ..., streams_can_resume: bool = ..., num_inflight_requests: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[ListedWorker, _Mapping]]] = ..., workers_refused: _Optional[_Iterable[_Union[RefusedWorker, _Mapping]]] = ..., decisions: _Optional[_Iterable[str]] = ...) -> None: ...

class ListedWorker(_message.Message):
    __slots__ = ("worker_id", "pool", "role", "address", "num_blocks", "load")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    pool: str
    role: _worker_pb2.WorkerRole
    address: str
    num_blocks: int
    load: _worker_load_pb2.WorkerLoad
    def __init__(self, worker_id: _Optional[str] = ..., pool: _Optional[str] = ..., role: _Optional[_Union[_worker_pb2.WorkerRole, str]] = ..., address: _Optional[str] = ..., num_blocks: _Optional[int] = ..., load: _Optional[_Union[_worker_load_pb2.WorkerLoad, _Mapping]] = ...) -> None: ...

class RefusedWorker(_message.Message):
    __slots__ = ("worker_id", "address", "reason")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    address: str
    reason: str
    def __init__(self, worker_id: _Optional[str] = ..., address: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...
