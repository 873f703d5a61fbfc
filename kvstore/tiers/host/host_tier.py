"""The tier of one host: fragments in the shared-memory arena that the host's node process owns.

The node process says which slot to write or read; the bytes are copied here, by the rank itself. One batch costs one or
two calls to the node and one copy per fragment. Survives the node process: while it is away the tier is down, and when
it is back the new arena is mapped. Knows nothing of other hosts, nor of who evicts what.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from switchyard.v1 import kvnode_pb2, kvnode_pb2_grpc

from kvstore.format.copying import Bytes
from kvstore.format.fragment import Fragment, Rejected
from kvstore.names import FRAGMENT_KEY_BYTES
from kvstore.network.availability import Availability
from kvstore.network.channels import NODE_ERRORS, call, dial, probe
from kvstore.network.quick_calls import CallInProgress
from kvstore.tiers.host.arena import Arena, ArenaMismatch, attach_arena
from kvstore.tiers.host.slot_calls import SlotCalls
from kvstore.tiers.host.slot_table import NO_SLOT, RESERVATION_S, SEALED_ALREADY

log = logging.getLogger(__name__)

_ERRORS: tuple[type[Exception], ...] = (*NODE_ERRORS, OSError, ArenaMismatch)

_MAX_PREPARED = 8  # stores
_PREPARED_S = RESERVATION_S / 3  # there must be time to write; a step that takes longer reserves when it is through

_Result = TypeVar("_Result")


class _ArenaReplaced(Exception):
    """The node answered for another arena than the one that is mapped."""


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """Slots that the node was asked for before they are written to."""

    arena: Arena
    keys: Sequence[bytes]
    call: CallInProgress
    since_s: float


@dataclass(frozen=True, slots=True)
class _Found:
    """What the node said of the keys' slots in this arena."""

    arena: Arena
    keys: Sequence[bytes]
    slots: Sequence[int]
    generations: Sequence[int]


class HostTier:
    """A client of the node process at `node_address`: unix:PATH, or HOST:PORT of the same host and cluster."""

    name = "host"

    def __init__(self, node_address: str, cluster: str = "") -> None:
        self._cluster = cluster
        self._channel = dial(node_address)
        self._stub = kvnode_pb2_grpc.KVNodeServiceStub(self._channel)
        self._attach_lock = threading.Lock()
        self._arena: Arena | None = None
        self._calls = SlotCalls("")  # until the node was reached
        self._node_id = ""
        self._peer_address = ""
        self._has_disk = False
        self._disk_problem = ""
        self._is_arena_too_small = False
        self._prepared: deque[_Prepared] = deque()
        self._prepared_lock = threading.Lock()
        name = f"host tier at {node_address}"
        self._availability = Availability(name, self._attach, lambda: self._attach(probe), _ERRORS)

    @property
    def is_up(self) -> bool:
        """As in Tier."""
        return self._availability.is_up

    @property
    def problem(self) -> str:
        """As in Tier."""
        return self._availability.problem

    @property
    def problems_behind(self) -> Mapping[str, str]:
        """As in HostMemoryTier: of the disk behind the node's arena, as the node said it last."""
        return {"disk": self.problem or self._disk_problem} if self._has_disk else {}

    @property
    def node_id(self) -> str:
        """Name of this host's node in the directory; empty until the node was reached for the first time."""
        return self._node_id

    @property
    def peer_address(self) -> str:
        """Where other hosts pull from this host's node; empty where they do not."""
        return self._peer_address

    @property
    def num_slots(self) -> int:
        """Of the arena; 0 until the node was reached."""
        arena = self._arena
        return 0 if arena is None else arena.num_slots

    @property
    def slot_bytes(self) -> int:
        """The largest payload that the arena takes; 0 until the node was reached."""
        arena = self._arena
        return 0 if arena is None else arena.slot_bytes

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each fragment is in the arena now; those that only the disk has are brought there first."""
        _check_keys(keys)
        found = self._on_arena(lambda arena: self._look_up(arena, keys)) if keys else None
        return [False] * len(keys) if found is None else [slot >= 0 for slot in found.slots]

    def prepare(self, keys: Sequence[bytes]) -> None:
        """As in HostMemoryTier: the node frees slots meanwhile."""
        _check_keys(keys)
        arena, now_s = self._arena, time.monotonic()
        if not keys or arena is None or not self._availability.is_up or self._is_arena_too_small:
            return
        with self._prepared_lock:
            while self._prepared and now_s - self._prepared[0].since_s > _PREPARED_S:
                self._prepared.popleft().call.give_up()  # its slots are free again when their reservations expire
            if len(self._prepared) >= _MAX_PREPARED:
                return
        try:
            call = self._calls.begin_reserve(kvnode_pb2.ReserveRequest(keys=keys))
        except _ERRORS:
            return  # store() will report the error
        with self._prepared_lock:
            self._prepared.append(_Prepared(arena, keys, call, now_s))

    def store(self, fragments: Sequence[Fragment]) -> list[bool]:
        """As in Tier. A fragment larger than a slot is not kept."""
        _check_keys([fragment.key for fragment in fragments])
        stored = self._on_arena(lambda arena: self._store(arena, fragments)) if fragments else []
        return [False] * len(fragments) if stored is None else stored

    def load(self, keys: Sequence[bytes]) -> Iterator[memoryview | Rejected | None]:
        """As in Tier, one by one."""
        _check_keys(keys)
        found = self._on_arena(lambda arena: self._look_up(arena, keys)) if keys else None
        return iter([None] * len(keys)) if found is None else self._read(found)

    def load_into(self, keys: Sequence[bytes], buffers: Sequence[Bytes]) -> Iterator[bool | Rejected]:
        """As in HostMemoryTier."""
        _check_keys(keys)
        found = self._on_arena(lambda arena: self._look_up(arena, keys)) if keys else None
        return iter([False] * len(keys)) if found is None else self._read_into(found, buffers)

    def close(self) -> None:
        """As in Tier."""
        self._availability.close(self._channel.close)
        self._calls.close()
        with self._prepared_lock:
            for prepared in self._prepared:
                prepared.call.give_up()
            self._prepared.clear()
        self._arena = None

    def _on_arena(self, action: Callable[[Arena], _Result]) -> _Result | None:
        """Runs the action on the mapped arena, once more if the arena was replaced; None when the node is away."""
        try:
            for _ in range(2):
                arena = self._arena
                if arena is None or not self._availability.is_up:
                    return None
                try:
                    return action(arena)
                except _ArenaReplaced:
                    self._attach()
        except _ERRORS as error:
            self._availability.lost(error)
        return None

    def _attach(self, ask: Callable[..., Any] = call) -> None:
        """Asks the node for its arena and maps it unless it is mapped already."""
        with self._attach_lock:
            reply = ask(self._stub.GetArena, kvnode_pb2.GetArenaRequest(), self._cluster)
            self._has_disk, self._disk_problem = reply.has_disk, reply.disk_problem
            path, arena = Path(reply.path), self._arena
            if arena is None or arena.path != path or not arena.is_current():
                attached = attach_arena(path, reply.slot_bytes, reply.num_slots)
                former, self._calls = self._calls, SlotCalls(reply.call_address)
                self._arena = attached
                self._is_arena_too_small = False
                former.close()
                self._node_id = reply.node_id
                self._peer_address = reply.peer_address

    def _store(self, arena: Arena, fragments: Sequence[Fragment]) -> list[bool]:
        stored = [False] * len(fragments)
        wanted = [i for i, fragment in enumerate(fragments) if fragment.num_bytes <= arena.slot_bytes]
        if len(wanted) < len(fragments):
            self._warn_of_size(arena)
        refs = self._reserve(arena, [fragments[i].key for i in wanted])
        if not arena.is_current():
            raise _ArenaReplaced
        written: list[int] = []
        slots: list[int] = []
        generations: list[int] = []
        for i, (slot, generation) in zip(wanted, refs, strict=True):
            if arena.is_reserved_as(
                slot, generation
            ):  # or this process stood still until the slot was reserved by another
                written.append(i)
                slots.append(slot)
                generations.append(generation)
            else:
                stored[i] = slot == SEALED_ALREADY
        if written:
            arena.write(slots, [fragments[i] for i in written], generations)
            keys = [fragments[i].key for i in written]
            is_sealed = self._seal(kvnode_pb2.SealRequest(keys=keys, slots=slots, generations=generations))
            for i, is_readable in zip(written, is_sealed, strict=True):
                stored[i] = is_readable
        return stored

    def _reserve(self, arena: Arena, keys: Sequence[bytes]) -> list[tuple[int, int]]:
        """(slot, generation) for each fragment: what was prepared for them, or what the node says now."""
        refs = self._take_prepared(arena, keys) or [(NO_SLOT, 0)] * len(keys)
        # Whether a fragment is there already is asked now: it may have gone since it was said.
        unsettled = [i for i, (slot, _) in enumerate(refs) if slot < 0]
        if unsettled:
            reply = self._calls.reserve(kvnode_pb2.ReserveRequest(keys=[keys[i] for i in unsettled]))
            for i, ref in zip(unsettled, zip(reply.slots, reply.generations, strict=True), strict=True):
                refs[i] = ref
        return refs

    def _take_prepared(self, arena: Arena, keys: Sequence[bytes]) -> list[tuple[int, int]]:
        """Empty when nothing was, or nothing that is good for anything now."""
        with self._prepared_lock:
            prepared = next((entry for entry in self._prepared if entry.keys == keys), None)
            if prepared is None:
                return []
            self._prepared.remove(prepared)
        # A reservation that may have expired is no slot to write to.
        if prepared.arena is not arena or time.monotonic() - prepared.since_s > _PREPARED_S:
            prepared.call.give_up()
            return []
        try:
            reply = prepared.call.answer()
        except _ERRORS:
            return []  # a node that was replaced since then
        return list(zip(reply.slots, reply.generations, strict=True))

    def _seal(self, request: kvnode_pb2.SealRequest) -> list[bool]:
        """Which of the fragments are readable now."""
        reply = self._calls.seal(request)
        if reply.num_sealed == len(request.keys):
            return [True] * len(request.keys)
        # Some reservations had been taken back meanwhile; only the node knows which.
        lookup = self._calls.lookup(kvnode_pb2.LookupRequest(keys=request.keys))
        return [slot >= 0 for slot in lookup.slots]

    def _look_up(self, arena: Arena, keys: Sequence[bytes]) -> _Found:
        reply = self._calls.lookup(kvnode_pb2.LookupRequest(keys=keys))
        if not arena.is_current():
            raise _ArenaReplaced
        return _Found(arena, keys, reply.slots, reply.generations)

    def _read(self, found: _Found) -> Iterator[memoryview | Rejected | None]:
        for key, slot, generation in zip(found.keys, found.slots, found.generations, strict=True):
            payload = found.arena.read(slot, key, generation) if slot >= 0 else None
            if isinstance(payload, Rejected) and not self._drop(found.arena, [key], [generation]):
                payload = None
            yield payload
            del payload  # or its buffer would be in use while the next one is read

    def _read_into(self, found: _Found, buffers: Sequence[Bytes]) -> Iterator[bool | Rejected]:
        there = [i for i, slot in enumerate(found.slots) if slot >= 0]
        rejected = found.arena.read_into(
            [found.slots[i] for i in there],
            [found.keys[i] for i in there],
            [found.generations[i] for i in there],
            [buffers[i] for i in there],
        )
        results: list[bool | Rejected] = [False] * len(found.keys)
        bad: list[int] = []
        for i, why in zip(there, rejected, strict=True):
            results[i] = True if why is None else why
            # Good bytes of another size stay: for others they are what they have under this name.
            if why is not None and not (why.reason == "layout" and self._is_good(found, i)):
                bad.append(i)
        if bad and not self._drop(found.arena, [found.keys[i] for i in bad], [found.generations[i] for i in bad]):
            for i in bad:
                results[i] = False
        return iter(results)

    def _is_good(self, found: _Found, i: int) -> bool:
        """Whether a fragment verifies, whatever its size."""
        return not isinstance(found.arena.read(found.slots[i], found.keys[i], found.generations[i]), Rejected)

    def _drop(self, arena: Arena, keys: Sequence[bytes], generations: Sequence[int]) -> bool:
        """Drops fragments that failed their verification; False when they went with the node process: none was bad."""
        if not arena.is_current():
            return False
        try:
            self._calls.drop(kvnode_pb2.DropRequest(keys=keys, generations=generations))
        except _ERRORS as error:
            self._availability.lost(error)
        return True

    def _warn_of_size(self, arena: Arena) -> None:
        if not self._is_arena_too_small:
            self._is_arena_too_small = True
            log.warning("a fragment is larger than the arena's slots of %d bytes and is not kept", arena.slot_bytes)


def _check_keys(keys: Sequence[bytes]) -> None:
    if any(len(key) != FRAGMENT_KEY_BYTES for key in keys):
        raise ValueError(f"a fragment's key has {FRAGMENT_KEY_BYTES} bytes")
