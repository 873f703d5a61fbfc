"""Finds out within seconds that a rank of a worker died, stopped or hangs, and says which one.

Every other rank has a connection to the leader, over which both say a few times a second how far they are. When it
closes without a farewell, the rank died; when it is silent, the process is stopped or its host is gone; when the count
does not grow, a thread hangs though its process lives. Knows nothing of models or requests.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from kvstore.network.addresses import connect, join_host_port, listen
from workers.errors import RankLost
from workers.parallel import ParallelGroups
from workers.runtime.coordination.progress import ProgressReport, StepProgress

log = logging.getLogger(__name__)

_BEAT_S = 0.25
_MEET_S = 60.0  # all ranks have loaded when they meet
_ADDRESS_WORDS = 256
_FAREWELL: dict[str, object] = {"farewell": True}


@dataclass(frozen=True, slots=True)
class WatchLimits:
    """From the engine's config."""

    silence_s: float
    stall_s: float


class _Peer:
    """A rank as this one sees it."""

    def __init__(self, name: str, connection: socket.socket | None) -> None:
        self.name = name
        self.connection = connection
        self.progress = ProgressReport(0, 0, False)
        self.heard_s: float | None = None  # None: the leader has not met it yet
        self.progressed_s = time.monotonic()
        self.has_left = False

    def take(self, progress: ProgressReport) -> None:
        self.heard_s = time.monotonic()
        if progress.sequence == 0 or (progress.sequence, progress.count) != (
            self.progress.sequence,
            self.progress.count,
        ):
            self.progressed_s = self.heard_s
        self.progress = progress


class RankWatch:
    """Of one rank. on_lost: called once, on a thread of the watch, when a rank is lost."""

    def __init__(self, groups: ParallelGroups, limits: WatchLimits, on_lost: Callable[[RankLost], None]) -> None:
        self.progress = StepProgress(groups.is_waiting)
        self._groups = groups
        self._limits = limits
        self._on_lost = on_lost
        self._listener: socket.socket | None = None
        self._address = ""
        self._own = _Peer(self._name(groups.shard.rank, os.getpid(), socket.gethostname()), None)
        self._peers: dict[int, _Peer] = {}
        self._stopping = threading.Event()
        self._lost = threading.Event()
        self._loss: RankLost | None = None
        self._lock = threading.Lock()

    def _name(self, rank: int, pid: int, host: str) -> str:
        return f"{self._groups.name_of(rank)[:-1]}, pid {pid} on {host})"

    def meet(self, listen_host: str) -> None:
        """Tell all ranks where the leader's watch is; on all of them at once. listen_host: of the leader."""
        if self._groups.world_size == 1:
            return
        words: torch.Tensor | None = None
        if self._groups.shard.rank == 0:
            self._listener = listen(listen_host, 0, self._groups.world_size)
            self._listener.settimeout(_MEET_S)
            address = join_host_port(listen_host, self._listener.getsockname()[1])
            words = torch.tensor(list(address.encode()), dtype=torch.int32)
        self._address = bytes(self._groups.broadcast_words(words, _ADDRESS_WORDS).tolist()).decode()

    def start(self) -> None:
        """Connect to the leader, or wait for all others, and watch from here on. Raises RankLost."""
        try:
            if self._listener is not None:
                while len(self._peers) < self._groups.world_size - 1:
                    self._accept(self._listener)
                self._listener.close()
            elif self._groups.world_size > 1:
                connection = connect(self._address, _MEET_S)
                self._send(connection, {"rank": self._groups.shard.rank, **self._who()})
                self._peers[0] = _Peer(self._groups.name_of(0), connection)
        except OSError as error:
            raise RankLost(f"the ranks of the worker did not meet within {_MEET_S:g} s: {error}") from error
        for peer in self._peers.values():
            threading.Thread(target=self._listen, args=(peer,), name="rank-watch", daemon=True).start()
        threading.Thread(target=self._beat, name="rank-beat", daemon=True).start()

    @staticmethod
    def _who() -> dict[str, object]:
        return {"pid": os.getpid(), "host": socket.gethostname()}

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.settimeout(_MEET_S)
        try:
            who = json.loads(_line_of(connection))
            rank, name = int(who["rank"]), self._name(int(who["rank"]), who["pid"], who["host"])
        except (ValueError, KeyError, TypeError):  # a port scan
            connection.close()
            return
        self._peers[rank] = peer = _Peer(name, connection)
        peer.heard_s = time.monotonic()
        self._send(connection, self._who())

    def stop(self) -> None:
        """Say farewell: what closes from now on is no loss."""
        self._stopping.set()
        for peer in self._peers.values():
            if peer.connection is not None:
                with contextlib.suppress(OSError):
                    self._send(peer.connection, _FAREWELL)
                    peer.connection.shutdown(socket.SHUT_WR)

    def say(self, error: BaseException) -> None:
        """This rank fails: its last words to the others."""
        words: dict[str, object] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        for peer in self._peers.values():
            if peer.connection is not None and not isinstance(error, RankLost):
                with contextlib.suppress(OSError):
                    self._send(peer.connection, words)

    def explained(self, error: BaseException, within_s: float = 2 * _BEAT_S) -> BaseException:
        """The loss of a rank in place of an error that may follow from it: what its peers see is a closed socket."""
        if isinstance(error, RankLost | RuntimeError | OSError) and self._peers:
            self._lost.wait(within_s)
        return self._loss or error

    # -------------------------------------------------------------------------------------------------- its own threads
    @staticmethod
    def _send(connection: socket.socket, message: dict[str, object]) -> None:
        connection.sendall(json.dumps(message).encode() + b"\n")

    def _beat(self) -> None:
        last_s = time.monotonic()
        while not self._stopping.wait(_BEAT_S):
            report = self.progress.report()
            self._own.take(report)
            for peer in self._peers.values():
                with contextlib.suppress(OSError):  # its reader finds out what that means
                    if peer.connection is not None and not peer.has_left:
                        self._send(peer.connection, asdict(report))
            now_s = time.monotonic()
            if now_s - last_s < self._limits.silence_s / 2:
                self._check(now_s)
            else:  # this process itself was stopped or starved: what the others said meanwhile is not read yet
                for peer in (self._own, *self._peers.values()):
                    peer.heard_s = peer.heard_s and now_s
                    peer.progressed_s = now_s
            last_s = now_s

    def _listen(self, peer: _Peer) -> None:
        assert peer.connection is not None
        try:
            peer.connection.settimeout(None)
            for line in peer.connection.makefile("rb"):
                message = json.loads(line)
                if message == _FAREWELL:
                    peer.has_left = True
                    return
                if "failed" in message:
                    self._lose(f"{peer.name} failed: {message['failed']}")
                    return
                if "pid" in message:
                    peer.name = self._name(0, message["pid"], message["host"])
                    peer.heard_s = time.monotonic()
                else:
                    peer.take(ProgressReport(**message))
        except (OSError, ValueError, TypeError):  # closed, or cut in the middle of a line
            pass
        self._lose(f"{peer.name} died: its connection closed")

    def _check(self, now_s: float) -> None:
        here = [peer for peer in self._peers.values() if not peer.has_left]
        for peer in here:
            if peer.heard_s is not None and now_s - peer.heard_s > self._limits.silence_s:
                silent_s = now_s - peer.heard_s
                self._lose(f"{peer.name} has said nothing for {silent_s:.1f} s: it is stopped, or its host is gone")
        if self._groups.shard.rank == 0:
            self._check_progress([self._own, *here], now_s)

    def _check_progress(self, ranks: list[_Peer], now_s: float) -> None:
        stalled = [r for r in ranks if r.progress.sequence and now_s - r.progressed_s > self._limits.stall_s]
        for rank in stalled:
            if not rank.progress.is_waiting:
                took_s = now_s - rank.progressed_s
                self._lose(f"{rank.name} hangs: no progress in step {rank.progress.sequence} for {took_s:.1f} s")
        is_still = all(not r.progress.sequence or r in stalled for r in ranks)
        if stalled and is_still and all(rank.progress.is_waiting or not rank.progress.sequence for rank in ranks):
            names = ", ".join(rank.name for rank in stalled)
            self._lose(
                f"{names}: waiting for other ranks for {now_s - stalled[0].progressed_s:.1f} s, which do nothing"
            )

    def _lose(self, why: str) -> None:
        with self._lock:
            if self._loss is not None or self._stopping.is_set():
                return
            self._loss = RankLost(why)
        self._lost.set()
        self._on_lost(self._loss)


def _line_of(connection: socket.socket) -> bytes:
    """The first line, and nothing behind it: that is for who listens next."""
    line = bytearray()
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    return bytes(line)
