"""Fragments read from the memory of another host's node process by NIXL: over RDMA where there is such a network.

The node process registers its arena with a NIXL agent; a rank's agent reads slots from it, one-sidedly, into private
buffers that it has registered. All else goes over the peer's authenticated TCP connection: what a reader must know of
the other agent, where the fragments lie, and after each read whether the slots are still their own, and tags. Agents
have no threads of their own: such a thread never sleeps. Imported only where NIXL was asked for. Knows nothing of
directories or of which peer has what.
"""

import ctypes
import logging
import mmap
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import nixl

from kvstore.format.authenticity import FragmentAuthenticator
from kvstore.format.fragment import Rejected
from kvstore.tiers.host.arena import Arena, arena_bytes
from kvstore.tiers.peers.peer_channel import Bodies, PeerChannel
from kvstore.tiers.peers.peer_wire import (
    GROUP_BYTES,
    READ,
    ProtocolError,
    TableEntry,
    address_bytes,
    groups,
    unpack_addresses,
)
from kvstore.tiers.peers.transport import Pulled

log = logging.getLogger(__name__)

# NIXL's own have no base in common; RuntimeError and ValueError are how its binding passes on those of C++.
_ERRORS: tuple[type[Exception], ...] = (
    *(error for error in vars(nixl._bindings).values() if isinstance(error, type) and issubclass(error, Exception)),
    *(RuntimeError, ValueError, OSError),
)

_MEMORY = "DRAM"
_KEPT_BUFFERS = 128  # of GROUP_BYTES: registered memory stays in place, so there is a bound
_LOOK_S = 0.00005  # between looks whether a read is through


class NixlMemory:
    """As ReadableMemory, of an arena that this process owns. Raises OSError."""

    def __init__(self, arena: Arena) -> None:
        num_bytes = arena_bytes(arena.slot_bytes, arena.num_slots)
        file_descriptor = os.open(arena.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            # A second mapping of the same pages. Writable: registering asks for it.
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            self._mapping = mmap.mmap(file_descriptor, num_bytes, flags=flags)
        finally:
            os.close(file_descriptor)
        self._slot_bytes = arena.slot_bytes
        self._first = _address_of(self._mapping)
        self._lock = threading.Lock()
        with _nixl_errors():
            self._agent = _make_agent()
            self._registered = self._agent.register_memory([(self._first, num_bytes, 0, "")], _MEMORY)
            self._description: bytes = self._agent.get_agent_metadata()

    @property
    def description(self) -> bytes:
        """As in ReadableMemory."""
        return self._description

    def address_of(self, slot: int) -> int:
        """As in ReadableMemory."""
        return self._first + arena_bytes(self._slot_bytes, slot)  # what an arena of the slots before it would need

    def progress(self) -> None:
        """As in ReadableMemory. Connecting needs it, and networks on which reading is not the hardware's."""
        with self._lock, _nixl_errors():
            self._agent.get_new_notifs()

    def close(self) -> None:
        """As in ReadableMemory."""
        with self._lock, _nixl_errors():
            self._agent.deregister_memory(self._registered)


@dataclass(eq=False, slots=True)
class _Remote:
    """A peer's agent, as this process's agent knows it."""

    name: Any
    description: bytes
    num_users: int = 0
    is_lost: bool = False


@dataclass(eq=False, slots=True)
class _Read:
    """A read in progress. Its buffer must not be used for anything else before it is through."""

    handle: Any
    remote: _Remote
    body: memoryview
    registered: Any
    """What is to be undone afterwards; None for a buffer that stays registered."""


class NixlReader:
    """The agent of a process that reads, and its buffers. Thread-safe. Raises OSError."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._remotes: dict[bytes, _Remote] = {}
        self._given_up: list[_Read] = []
        self._unused: deque[mmap.mmap] = deque()  # filled when a buffer is released, without the lock
        self._num_kept = 0
        with _nixl_errors():
            self._agent = _make_agent()

    def connect(self, description: bytes) -> _Remote:
        """Gets to know a peer's agent."""
        with self._lock, _nixl_errors():
            remote = self._remotes.get(description)
            if remote is None:
                remote = _Remote(self._agent.add_remote_agent(description), description)
                self._remotes[description] = remote
            elif remote.is_lost:
                raise ConnectionError("NIXL: the peer's agent was lost, and readers have not all let it go")
            remote.num_users += 1
            return remote

    def disconnect(self, remote: _Remote) -> None:
        """The last user's lets the agent forget it."""
        with self._lock:
            remote.num_users -= 1
            if remote.num_users == 0:
                del self._remotes[remote.description]
                try:
                    self._agent.remove_remote_agent(remote.name)
                except _ERRORS as error:  # it is gone already
                    log.debug("NIXL: %s", error)

    def start(self, remote: _Remote, ranges: Sequence[tuple[int, int]]) -> _Read:
        """Begins to read (address, bytes) one behind the other into a private buffer."""
        num_bytes = sum(size for _, size in ranges)
        with self._lock, _nixl_errors(remote):
            self._look_after_given_up()
            buffer, registered = self._take(num_bytes)
            try:
                handle = self._prepare(remote, ranges, _address_of(buffer))
            except _ERRORS:
                if registered is not None:
                    self._agent.deregister_memory(registered)
                raise
            read = _Read(handle, remote, buffer[:num_bytes], registered)
            self._given_up.append(read)  # until it is certain that it began
            if self._agent.transfer(handle) == "ERR":
                raise ConnectionError("NIXL: a read failed")
            self._given_up.remove(read)
            return read

    def wait(self, read: _Read, deadline_s: float) -> memoryview:
        """The bytes, once they are all there."""
        while not self._is_through(read):
            if time.monotonic() > deadline_s:
                raise ProtocolError("the other end is gone, or too slow")
            time.sleep(_LOOK_S)
        return read.body

    def give_up(self, read: _Read) -> None:
        """The buffer is kept until nothing can be written into it any more."""
        with self._lock:
            self._given_up.append(read)
            self._look_after_given_up()

    def _prepare(self, remote: _Remote, ranges: Sequence[tuple[int, int]], first: int) -> Any:
        here, there = [], []
        for address, size in ranges:
            here.append((first, size, 0))
            there.append((address, size, 0))
            first += size
        agent = self._agent
        local, distant = agent.get_xfer_descs(here, _MEMORY), agent.get_xfer_descs(there, _MEMORY)
        return agent.initialize_xfer("READ", local, distant, remote.name)

    def _is_through(self, read: _Read) -> bool:
        with self._lock, _nixl_errors(read.remote):
            state = self._agent.check_xfer_state(read.handle)
            if state == "ERR":
                raise ConnectionError("NIXL: a read failed")
            if state == "DONE":
                self._release(read)
            return bool(state == "DONE")

    def _release(self, read: _Read) -> None:
        self._agent.release_xfer_handle(read.handle)
        if read.registered is not None:
            self._agent.deregister_memory(read.registered)

    def _look_after_given_up(self) -> None:
        kept: list[_Read] = []
        for read in self._given_up:
            try:
                self._release(read)
            except _ERRORS:  # still in progress, and not to be stopped
                kept.append(read)
        self._given_up = kept

    def _take(self, num_bytes: int) -> tuple[memoryview, Any]:
        """An unused buffer, and its registration if that is for this read only."""
        if num_bytes <= GROUP_BYTES and self._unused:
            return self._lend(self._unused.popleft()), None
        mapping = mmap.mmap(-1, max(num_bytes, GROUP_BYTES))
        registered = self._agent.register_memory([(_address_of(mapping), len(mapping), 0, "")], _MEMORY)
        if num_bytes <= GROUP_BYTES and self._num_kept < _KEPT_BUFFERS:
            self._num_kept += 1
            return self._lend(mapping), None
        return memoryview(mapping), registered

    def _lend(self, mapping: mmap.mmap) -> memoryview:
        """A view of all of it; when the last view of that is gone it is unused again."""
        owner = (ctypes.c_ubyte * len(mapping)).from_buffer(mapping)
        weakref.finalize(owner, self._unused.append, mapping).atexit = False
        return memoryview(owner).cast("B")


class NixlTransport:
    """As Transport. Connects at once; raises OSError."""

    def __init__(self, address: str, authenticator: FragmentAuthenticator, reader: NixlReader) -> None:
        self._reader = reader
        self._is_closed = False
        self._channel = PeerChannel(address, authenticator)
        try:
            description = self._channel.describe()
            if not description:
                raise ProtocolError("a peer whose memory cannot be read: kvstore.peer_transport is tcp there")
            self._remote = reader.connect(description)
        except BaseException:
            self._channel.close()
            raise

    def pull(self, keys: Sequence[bytes], deadline_s: float) -> Iterator[tuple[int, Pulled | Rejected]]:
        """As in Transport."""
        return self._channel.pull(READ, keys, deadline_s, lambda table: self._bodies(table, deadline_s))

    def check(self, keys: Sequence[bytes], deadline_s: float) -> None:
        """As in Transport."""
        self._channel.check(keys, deadline_s)

    def close(self) -> None:
        """As in Transport."""
        if not self._is_closed:
            self._is_closed = True
            self._channel.close()
            self._reader.disconnect(self._remote)

    def _bodies(self, table: Sequence[TableEntry], deadline_s: float) -> Bodies:
        """One group is read while the one before it is verified."""
        addresses = unpack_addresses(self._channel.receive_exactly(address_bytes(len(table)), deadline_s), len(table))
        waiting = deque(groups(table))
        started: deque[tuple[list[int], _Read]] = deque()
        try:
            while waiting or started:
                if not started:
                    started.append(self._start(waiting.popleft(), table, addresses))
                group, read = started[0]
                body = self._reader.wait(read, deadline_s)
                started.popleft()
                self._channel.tell_read(READ, len(group))
                if waiting:
                    started.append(self._start(waiting.popleft(), table, addresses))
                yield group, body
        finally:
            for _, read in started:
                self._reader.give_up(read)

    def _start(
        self, group: list[int], table: Sequence[TableEntry], addresses: Sequence[int]
    ) -> tuple[list[int], _Read]:
        return group, self._reader.start(self._remote, [(addresses[i], table[i].sealed_bytes) for i in group])


@contextmanager
def _nixl_errors(remote: _Remote | None = None) -> Iterator[None]:
    """What NIXL raises becomes an OSError, and the peer is lost."""
    try:
        yield
    except _ERRORS as error:
        if remote is not None:
            remote.is_lost = True
        if isinstance(error, OSError):
            raise
        raise ConnectionError(f"NIXL: {error}") from error


def _make_agent() -> Any:
    for handler in logging.getLogger("nixl").handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)  # a program's output is the program's
    name = f"switchyard-{os.getpid()}-{os.urandom(8).hex()}"  # two agents of one name would be taken for one
    agent = nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    if "UCX" not in agent.backends:
        raise ConnectionError("NIXL: it has no UCX here")
    return agent


def _address_of(buffer: mmap.mmap | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
