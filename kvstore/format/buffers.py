"""Buffers for private copies, used again as soon as no view of them is held.

Fresh memory is expensive: the kernel zeroes and maps each page on first touch, which costs more than copying it. Knows
nothing of what is copied.
"""

import ctypes
import threading
from collections import deque
from dataclasses import dataclass

ALIGNMENT_BYTES = 4096  # a page: what direct I/O asks for
# And what copies need: on AMD's Zen 3 and 4 a copy whose target lies 1 to 31 bytes behind its source, modulo a page,
# runs at a fifth of its speed. Python's own buffers begin 16 bytes behind a page, slots of an arena at multiples of 64.

_KEPT_BYTES = 256 * 1024 * 1024  # in all; what is lent beyond that is freed when it comes back


@dataclass(slots=True)
class _Buffer:
    memory: bytearray
    first: int  # where the page begins


class CopyBuffers:
    """Hands out writable views of buffers of one size. Thread-safe."""

    def __init__(self, buffer_bytes: int, kept_bytes: int = _KEPT_BYTES, page_at: int = 0) -> None:
        """page_at: where in a buffer a page begins; behind a header, say, where the bytes are that are copied."""
        self._buffer_bytes = buffer_bytes
        self._page_at = page_at
        self._max_buffers = max(1, kept_bytes // (buffer_bytes + ALIGNMENT_BYTES))
        self._buffers: deque[_Buffer] = deque()  # longest lent first
        self._lock = threading.Lock()

    def take(self) -> memoryview:
        """A buffer of which no other view exists; it stays the caller's until the last view of it is gone."""
        with self._lock:
            if self._buffers and _is_unused(self._buffers[-1].memory):  # lent last: still in the processor's caches
                return self._view(self._buffers[-1])  # taken under the lock: from here on it is in use
            if self._buffers and _is_unused(self._buffers[0].memory):
                self._buffers.rotate(-1)
                return self._view(self._buffers[-1])
            if len(self._buffers) < self._max_buffers:
                self._buffers.append(self._new())
                return self._view(self._buffers[-1])
            self._buffers.rotate(-1)  # do not ask the same one forever
        return self._view(self._new())

    def _new(self) -> _Buffer:
        memory = bytearray(self._buffer_bytes + ALIGNMENT_BYTES)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        return _Buffer(memory, -(address + self._page_at) % ALIGNMENT_BYTES)

    def _view(self, buffer: _Buffer) -> memoryview:
        return memoryview(buffer.memory)[buffer.first : buffer.first + self._buffer_bytes]


def _is_unused(memory: bytearray) -> bool:
    """Python refuses to resize a bytearray while a view of it, or of a part of it, exists."""
    try:
        last = memory.pop()
    except BufferError:
        return False
    memory.append(last)  # in place: popping a byte keeps the allocation
    return True
