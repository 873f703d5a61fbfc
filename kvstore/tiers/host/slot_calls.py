"""The calls of KVNodeService that a KV transfer waits for, made over kvstore.network.quick_calls.

Both ends' list of what they are called there. Knows nothing of slots.
"""

from typing import Any, NoReturn, TypeAlias

from google.protobuf.message import DecodeError
from switchyard.v1 import kvnode_pb2

from kvstore.network.quick_calls import CallInProgress, CallServer, Handler, Message, QuickCalls

_KINDS: dict[str, tuple[int, Any, Any]] = {  # number, request, answer
    "Reserve": (1, kvnode_pb2.ReserveRequest, kvnode_pb2.ReserveResponse),
    "Seal": (2, kvnode_pb2.SealRequest, kvnode_pb2.SealResponse),
    "Lookup": (3, kvnode_pb2.LookupRequest, kvnode_pb2.LookupResponse),
    "Drop": (4, kvnode_pb2.DropRequest, kvnode_pb2.DropResponse),
}
_TIMEOUT_S = 5.0  # a node answers in a millisecond; a starved machine is not a lost node

Servicer: TypeAlias = Any  # of KVNodeService: has the methods above


class SlotCalls:
    """A client of the node process that answers at this address. Raises OSError when it does not."""

    def __init__(self, address: str) -> None:
        self._calls = QuickCalls(address, _TIMEOUT_S)

    def reserve(self, request: kvnode_pb2.ReserveRequest) -> kvnode_pb2.ReserveResponse:
        """As in kvnode.proto."""
        return self._call("Reserve", request)  # type: ignore[no-any-return]

    def begin_reserve(self, request: kvnode_pb2.ReserveRequest) -> CallInProgress:
        """reserve(), for a caller that has something to do meanwhile."""
        return self._begin("Reserve", request)

    def seal(self, request: kvnode_pb2.SealRequest) -> kvnode_pb2.SealResponse:
        """As in kvnode.proto."""
        return self._call("Seal", request)  # type: ignore[no-any-return]

    def lookup(self, request: kvnode_pb2.LookupRequest) -> kvnode_pb2.LookupResponse:
        """As in kvnode.proto."""
        return self._call("Lookup", request)  # type: ignore[no-any-return]

    def drop(self, request: kvnode_pb2.DropRequest) -> kvnode_pb2.DropResponse:
        """As in kvnode.proto."""
        return self._call("Drop", request)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Calls fail from then on."""
        self._calls.close()

    def _call(self, name: str, request: Message) -> Any:
        return self._begin(name, request).answer()

    def _begin(self, name: str, request: Message) -> CallInProgress:
        kind, _, response = _KINDS[name]
        return self._calls.begin(kind, request, response.FromString)


def serve_slot_calls(address: str, servicer: Servicer) -> CallServer:
    """Answers them with the servicer's methods. Raises OSError when it cannot listen."""
    return CallServer(address, {kind: _handler(servicer, name) for name, (kind, _, _) in _KINDS.items()})


def _handler(servicer: Servicer, name: str) -> Handler:
    method, (_, request, _) = getattr(servicer, name), _KINDS[name]

    def answer(message: bytes) -> Message:
        try:
            asked = request.FromString(message)
        except DecodeError as error:
            raise ValueError(str(error)) from error
        return method(asked, _Context())  # type: ignore[no-any-return]

    return answer


class _Context:
    """Stands for gRPC's: to abort is to raise ValueError."""

    def abort(self, code: object, details: str) -> NoReturn:
        raise ValueError(details)
