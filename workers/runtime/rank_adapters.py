"""Carries out a plan's orders about adapters on one rank: reads them beside the steps, copies them within one.

A thread reads the files, checks them, and cuts out the rank's share; a slow disk delays only those that wait for it.
Knows nothing of requests, nor of which adapters should be where.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from checkpoint.adapters.directory import Adapter, open_adapter
from checkpoint.errors import CheckpointError
from workers.engine.adapters.ref import AdapterAction, AdapterOrder
from workers.engine.step import TransferDone
from workers.errors import AdapterError, StepFailed

log = logging.getLogger(__name__)

READ_THREADS = 8  # most of their time they wait for a disk; one that hangs must not hold up the others
_UNFIT, _OTHER = "!", "-"  # what a reason begins with
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Read(Generic[T]):
    """How a read ended here."""

    loaded: T | None
    error: str = ""
    is_unfit: bool = False


class RankAdapters(Generic[T]):
    """load: makes what the rank keeps of an adapter and the bytes of its tensors; in any thread. put: brings it into a
    slot; in the thread of the steps."""

    def __init__(self, load: Callable[[Adapter, bytes], T], put: Callable[[int, T], None]) -> None:
        self._load, self._put = load, put
        self._in_host_memory: dict[bytes, T] = {}
        self._digests: dict[int, bytes] = {}  # of reads that are under way
        self._lock = threading.Lock()
        self._ended: dict[int, _Read[T]] = {}  # by id, until the read has ended on every rank
        self._threads = ThreadPoolExecutor(READ_THREADS, "adapter")
        self.on_ended: Callable[[], None] = lambda: None
        """Called on a thread of this object whenever a read has ended here."""

    def carry_out(self, orders: Sequence[AdapterOrder], is_full: bool) -> None:
        """A plan's orders. Raises StepFailed for one that does not fit what was ordered before."""
        if is_full:
            kept = {order.digest for order in orders if order.action is AdapterAction.KEEP}
            for digest in [digest for digest in list(self._in_host_memory) if digest not in kept]:
                del self._in_host_memory[digest]
        for order in orders:
            match order.action:
                case AdapterAction.READ:
                    self._digests[order.number] = order.digest
                    self._threads.submit(self._run, order)
                case AdapterAction.COPY:
                    loaded = self._in_host_memory.get(order.digest)
                    if loaded is None:
                        raise StepFailed(f"adapter {order.digest.hex()}: is not in host memory")
                    self._put(order.number, loaded)
                case AdapterAction.DROP:
                    self._in_host_memory.pop(order.digest, None)

    # ---------------------------------------------------------------------------------------------------------- reads
    def ended(self) -> list[int]:
        """Reads that have ended on this rank and were not finished."""
        with self._lock:
            return list(self._ended)

    def poll(self, transfer_id: int) -> int | None:
        """1: it is read; 0: it failed; None: it has not ended here, or is no read."""
        with self._lock:
            read = self._ended.get(transfer_id)
        return None if read is None else int(read.loaded is not None)

    def claim(self, ended: Sequence[TransferDone]) -> list[TransferDone]:
        """Transfers that have ended on every rank: those that are reads are finished here, and say why they failed."""
        return [self._claimed(done) for done in ended]

    def _claimed(self, done: TransferDone) -> TransferDone:
        with self._lock:
            read, digest = self._ended.pop(done.transfer_id, None), self._digests.pop(done.transfer_id, None)
        if read is None or digest is None:
            return done
        if done.num_blocks and read.loaded is not None:
            self._in_host_memory[digest] = read.loaded
        return TransferDone(done.transfer_id, done.num_blocks, read.error, read.is_unfit)

    def finish_ended(self) -> list[TransferDone]:
        """The same for a worker of one rank: all that have ended."""
        return self.claim([TransferDone(transfer_id, self.poll(transfer_id) or 0) for transfer_id in self.ended()])

    def forget(self) -> None:
        """A step raised: give up all reads. Those under way end unseen."""
        with self._lock:
            self._digests = {}
            self._ended.clear()

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, order: AdapterOrder) -> None:
        read = self._read(order)
        with self._lock:
            if self._digests.get(order.number) == order.digest:
                self._ended[order.number] = read
        self.on_ended()

    def _read(self, order: AdapterOrder) -> _Read[T]:
        try:
            adapter, content = open_adapter(Path(order.path))
            if adapter.digest != order.digest:
                return _Read(None, f"{order.path}: the adapter's files have changed since it was loaded")
            return _Read(self._load(adapter, content))
        except AdapterError as error:
            return _Read(None, str(error), error.is_unfit)
        except CheckpointError as error:
            return _Read(None, str(error))
        except Exception as error:  # its requests end, and no others
            log.exception("%s: the adapter was not read", order.path)
            return _Read(None, f"{order.path}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def reason_of(done: TransferDone) -> str:
    """Why a read failed on this rank, as the ranks tell each other; empty: it did not."""
    return done.error and (_UNFIT if done.is_unfit else _OTHER) + done.error


def with_reasons(done: TransferDone, reasons: Sequence[str]) -> TransferDone:
    """A failed read with why it failed: here, or on the first rank where it did. reasons: reason_of, of each rank."""
    is_unfit = any(reason.startswith(_UNFIT) for reason in reasons)
    if done.error:
        return replace(done, is_unfit=is_unfit)
    found = next(((rank, reason) for rank, reason in enumerate(reasons) if reason), None)
    error = "" if found is None else f"rank {found[0]}: {found[1][len(_UNFIT) :]}"
    return replace(done, error=error, is_unfit=is_unfit)
