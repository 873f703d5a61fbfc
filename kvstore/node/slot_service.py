"""The slot calls of a node process: writers reserve and seal slots, readers look fragments up and drop damaged ones.

Errors of the caller are ValueErrors, which kvstore.network.quick_calls sends back. Bytes never pass through here.
"""

from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.message import DecodeError
from switchyard.v1 import kvnode_pb2 as pb

from kvstore.names import FRAGMENT_KEY_BYTES
from kvstore.network.quick_calls import CallServer, Handler, Message
from kvstore.node.node_slots import NodeSlots
from kvstore.tiers.host.slot_calls import SLOT_CALLS
from kvstore.tiers.host.slot_table import SlotRef


class SlotService:
    """Hands out slots of one arena. See kvnode.proto."""

    def __init__(self, slots: NodeSlots) -> None:
        self._slots = slots

    def serve(self, address: str) -> CallServer:
        """Answer calls at this address. Raises OSError when it cannot listen."""
        methods: dict[str, Callable[[Any], Message]] = {
            "Reserve": self.reserve,
            "Seal": self.seal,
            "Lookup": self.lookup,
            "Drop": self.drop,
        }
        return CallServer(
            address, {call.kind: _handler(methods[name], call.request) for name, call in SLOT_CALLS.items()}
        )

    def reserve(self, request: pb.ReserveRequest) -> pb.ReserveResponse:
        """A slot for each fragment that is not there yet; the caller copies the bytes in, then seals."""
        keys = list(request.keys)  # once: a message makes them anew whenever it is asked
        if set(map(len, keys)) - {FRAGMENT_KEY_BYTES}:
            raise ValueError(f"keys: must have {FRAGMENT_KEY_BYTES} bytes each")
        refs = self._slots.reserve(keys)
        return pb.ReserveResponse(slots=[ref.slot for ref in refs], generations=[ref.generation for ref in refs])

    def seal(self, request: pb.SealRequest) -> pb.SealResponse:
        """Makes reserved slots readable."""
        _check_same_length(request.keys, request.slots)
        _check_same_length(request.keys, request.generations)
        refs = [SlotRef(slot, generation) for slot, generation in zip(request.slots, request.generations, strict=True)]
        return pb.SealResponse(num_sealed=self._slots.seal(list(request.keys), refs))

    def lookup(self, request: pb.LookupRequest) -> pb.LookupResponse:
        """Where fragments are; those that only the disk has are brought into slots first."""
        refs = self._slots.lookup(list(request.keys))
        return pb.LookupResponse(slots=[ref.slot for ref in refs], generations=[ref.generation for ref in refs])

    def drop(self, request: pb.DropRequest) -> pb.DropResponse:
        """Frees the slots of fragments that a reader found damaged."""
        _check_same_length(request.keys, request.generations)
        return pb.DropResponse(num_dropped=self._slots.drop(request.keys, request.generations))


def _handler(method: Callable[[Any], Message], request: Any) -> Handler:
    def answer(message: bytes) -> Message:
        try:
            asked = request.FromString(message)
        except DecodeError as error:
            raise ValueError(str(error)) from error
        return method(asked)

    return answer


def _check_same_length(keys: Sequence[bytes], values: Sequence[int]) -> None:
    if len(keys) != len(values):
        raise ValueError(f"{len(keys)} keys with {len(values)} values")
