from switchyard.v1 import adapter_pb2 as _adapter_pb2
from switchyard.v1 import generation_pb2 as _generation_pb2
from switchyard.v1 import identity_pb2 as _identity_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StreamRecord(_message.Message):
    __slots__ = ("request", "deadline_unix_s", "tenant_salt", "served", "adapter")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    TENANT_SALT_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    request: _generation_pb2.GenerateRequest
    deadline_unix_s: float
    tenant_salt: bytes
    served: _identity_pb2.ServedModel
    adapter: _adapter_pb2.Adapter
    def __init__(self, request: _Optional[_Union[_generation_pb2.GenerateRequest, _Mapping]] = ..., deadline_unix_s: _Optional[float] = ..., tenant_salt: _Optional[bytes] = ..., served: _Optional[_Union[_identity_pb2.ServedModel, _Mapping]] = ..., adapter: _Optional[_Union[_adapter_pb2.Adapter, _Mapping]] = ...) -> None: ...
