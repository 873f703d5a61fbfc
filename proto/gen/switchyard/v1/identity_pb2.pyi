from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class ServedModel(_message.Message):
    __slots__ = ("cluster", "model", "weights", "tokenizer")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    model: str
    weights: str
    tokenizer: str
    def __init__(self, cluster: _Optional[str] = ..., model: _Optional[str] = ..., weights: _Optional[str] = ..., tokenizer: _Optional[str] = ...) -> None: ...
