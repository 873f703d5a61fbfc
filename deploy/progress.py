"""Shows on a terminal what is being done and how long it took. Writes to stderr; stdout is for results."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from deploy.errors import DeployError

_FRAMES = "|/-\\"
_FRAME_S = 0.1


@contextmanager
def own_stdout() -> Iterator[TextIO]:
    """Stdout for us alone: what libraries and children print while the block runs goes to stderr.

    Ray prints what its daemons report, in the middle of our JSON.
    """
    before = sys.stdout
    before.flush()
    descriptor = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace", closefd=False) as ours:
            yield ours
    finally:
        sys.stdout = before
        os.dup2(descriptor, 1)
        os.close(descriptor)


def say(text: str, stream: TextIO) -> None:
    """Write and flush. A terminal, or a reader, that is gone is no reason to end a cluster: then it goes nowhere."""
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        _send_nowhere(stream)


def deliver(text: str, stream: TextIO) -> None:
    """Write and flush a result. Raises DeployError when it is lost, as on a full disk; not when its reader is gone."""
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError) as error:
        _send_nowhere(stream)
        if not isinstance(error, BrokenPipeError):
            raise DeployError(f"cannot write the result: {getattr(error, 'strerror', None) or error}") from None


def _send_nowhere(stream: TextIO) -> None:
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())  # also what is buffered, when the interpreter ends


def open_closed_streams() -> None:
    """Open standard streams that our parent closed (`>&-`): otherwise the next opened file would take their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


class Steps:
    """One line per step, with a spinner while it lasts when the stream is a terminal."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet
        self._lock = threading.Lock()
        self.before_step: Callable[[], None] = lambda: None
        """Called before each step; may raise."""

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Show a step while the block runs."""
        self.before_step()
        began = time.monotonic()
        done = threading.Event()
        spinner = threading.Thread(target=self._spin, args=(what, began, done), daemon=True)
        if self._animates:
            spinner.start()
        outcome = "failed after"
        try:
            yield
            outcome = ""
        finally:
            done.set()
            if self._animates:
                spinner.join()
            self._line(f"{what:<44} {outcome + ' ' if outcome else ''}{time.monotonic() - began:5.1f} s")

    def note(self, text: str) -> None:
        """A line of its own, in the middle of a step too."""
        self._line(text)

    @property
    def _animates(self) -> bool:
        return not self._quiet and self._stream.isatty()

    def _line(self, text: str) -> None:
        if not self._quiet:
            with self._lock:
                say(("\r\x1b[K" if self._animates else "") + text + "\n", self._stream)

    def _spin(self, what: str, began: float, done: threading.Event) -> None:
        frame = 0
        while not done.wait(_FRAME_S):
            frame += 1
            with self._lock:
                say(f"\r\x1b[K{_FRAMES[frame % len(_FRAMES)]} {what} {time.monotonic() - began:.0f} s", self._stream)
