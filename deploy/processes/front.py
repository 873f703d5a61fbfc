"""Keeps signals that are meant for `switchyard serve` away from the processes that it started.

A terminal, `timeout` and `kill -TERM -GROUP` signal a whole process group, and Ray's processes would end before a
stream has. So the command forks first: the parent stays in the group, passes each signal on to the child, and ends with
the child's exit code; the child does the work in a session of its own. Knows nothing of clusters.

Every signal is passed on as SIGINT. Ray gives SIGTERM another handler while it starts, and none at all when it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a command to end."""

_SAME_S = 0.3  # `timeout` signals its child and its group at once and means one; a double Ctrl-C is not so quick
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_KILLED = 128  # and the signal's number: what a shell says of a command that a signal has ended


def is_ignored(number: int) -> bool:
    """Whether our parent set this signal to be ignored, as nohup does with SIGHUP. Ctrl-C and SIGTERM always end us."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


class Asked:
    """Distinguishes a second request to stop from a duplicate of the first signal."""

    def __init__(self, same_s: float) -> None:
        """same_s: what comes so soon after the first one belongs to it."""
        self._same_s = same_s
        self._first_s: float | None = None

    @property
    def was_asked(self) -> bool:
        """Whether there was a signal."""
        return self._first_s is not None

    def is_new(self, number: int) -> bool:
        """Note a signal; whether it means more than those before. A terminal that is closed is in no hurry."""
        now_s = time.monotonic()
        if self._first_s is None:
            self._first_s = now_s
            return True
        return number != signal.SIGHUP and now_s - self._first_s >= self._same_s


def run_behind_front(command: Callable[[], int]) -> int:
    """Run the command in a child; returns its exit code in the parent, and ends the child.

    For a process with one thread that has started nothing.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    front = os.getpid()
    # Until the child has left the group, what the group is sent reaches both: the child drops it, we pass ours on.
    signal.signal(
        signal.SIGCHLD, signal.SIG_DFL
    )  # our parent may have left it ignored: then no child could be waited for
    wanted = {number for number in SIGNALS if not is_ignored(number)} | {signal.SIGCHLD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*SIGNALS, signal.SIGCHLD})
    is_apart, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(is_apart)
        _move_apart(front)
        os.close(tell)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _end_with(command())
    os.close(tell)
    os.read(is_apart, 1)
    os.close(is_apart)
    return _relay_to(child, wanted)


def _move_apart(front: int) -> None:
    os.setsid()
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)  # a front that is killed ends us in order
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans stay below us, where they are found at the end
        while signal.sigtimedwait(SIGNALS, 0) is not None:
            continue
    if os.getppid() != front:
        os._exit(1)  # it was killed before we asked


def _end_with(code: int) -> NoReturn:
    """End without the interpreter's own end, in which Ray's native code crashes when its start was interrupted."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _relay_to(child: int, wanted: set[signal.Signals]) -> int:
    """Wait for signals, which stay blocked: one that came just before a wait could be missed by a handler."""
    asked = Asked(_SAME_S)
    while True:
        number = signal.sigwait(wanted)
        if number != signal.SIGCHLD:
            if asked.is_new(number):
                os.kill(child, signal.SIGINT)
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else _KILLED - code
