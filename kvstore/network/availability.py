"""Whether the other end of a tier or directory answers, kept up to date by a thread of its own.

Callers never wait for a reconnection: they report a loss and go on without it, and the thread probes with growing
pauses until the other end is back. Knows nothing of what the other end is.
"""

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.05
_LONGEST_RETRY_S = 0.5
_CHECK_INTERVAL_S = 1.0


class Availability:
    """Runs `check` at once, then `probe`, which may wait, every second, or in growing pauses while it fails."""

    def __init__(
        self,
        name: str,
        check: Callable[[], None],
        probe: Callable[[], None],
        errors: tuple[type[Exception], ...],
    ) -> None:
        self.is_up = False
        self.problem = ""
        """Why it is down, in one line; empty while it is up."""
        self._name = name
        self._errors = errors
        self._retry_s = _FIRST_RETRY_S
        self._wake = threading.Event()
        self._is_closed = False
        self._lock = threading.Lock()
        self._try(check)
        self._thread = threading.Thread(target=self._run, args=(probe,), name=f"{name}-availability", daemon=True)
        self._thread.start()

    def lost(self, error: Exception) -> None:
        """A call failed: the other end counts as away until a probe succeeds."""
        with self._lock:
            if self.is_up:
                log.warning("%s is down: %s", self._name, one_line(error))
            self.is_up = False
            self.problem = one_line(error)
            self._retry_s = _FIRST_RETRY_S
        self._wake.set()

    def close(self, interrupt: Callable[[], None] | None = None) -> None:
        """Down for good; waits for the thread. `interrupt` makes a probe in progress fail, which shortens the wait."""
        with self._lock:
            self._is_closed = True
            self.is_up = False
        self._wake.set()
        if interrupt is not None:
            interrupt()
        self._thread.join()

    def _run(self, probe: Callable[[], None]) -> None:
        while not self._is_closed:
            self._wake.wait(_CHECK_INTERVAL_S if self.is_up else self._retry_s)
            if self._wake.is_set():
                self._wake.clear()  # a loss was reported: one short pause, then the first retry
                continue
            self._try(probe)

    def _try(self, question: Callable[[], None]) -> None:
        try:
            question()
        except self._errors as error:
            with self._lock:
                if self.is_up:
                    log.warning("%s is down: %s", self._name, one_line(error))
                    self._retry_s = _FIRST_RETRY_S
                else:
                    self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S)
                self.is_up = False
                self.problem = one_line(error)
            return
        with self._lock:
            if not self.is_up and not self._is_closed:
                log.info("%s is up", self._name)
                self.is_up = True
                self.problem = ""


def one_line(error: Exception) -> str:
    """The error for a log line: gRPC's own text has many lines, of which `details` has the one that matters."""
    details = getattr(error, "details", None)
    text = str(details() if callable(details) else error)
    return " ".join(text.split()) or type(error).__name__
