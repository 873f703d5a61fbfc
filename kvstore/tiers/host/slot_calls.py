"""The slot calls to a node process, which KV transfers wait for, over kvstore.network.quick_calls.

kvstore.node.slot_service answers them. Knows nothing of slots.
"""

from typing import Any, NamedTuple

from switchyard.v1 import kvnode_pb2

from kvstore.network.quick_calls import CallInProgress, Message, QuickCalls


class SlotCall(NamedTuple):
    """One kind of call, and its messages in kvnode.proto."""

    kind: int
    request: Any
    response: Any


SLOT_CALLS = {
    "Reserve": SlotCall(1, kvnode_pb2.ReserveRequest, kvnode_pb2.ReserveResponse),
    "Seal": SlotCall(2, kvnode_pb2.SealRequest, kvnode_pb2.SealResponse),
    "Lookup": SlotCall(3, kvnode_pb2.LookupRequest, kvnode_pb2.LookupResponse),
    "Drop": SlotCall(4, kvnode_pb2.DropRequest, kvnode_pb2.DropResponse),
}
_TIMEOUT_S = 5.0  # a node answers in a millisecond; a starved machine is not a lost node


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
        call = SLOT_CALLS[name]
        return self._calls.begin(call.kind, request, call.response.FromString)
