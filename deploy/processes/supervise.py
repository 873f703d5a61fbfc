"""Keeps one child process running: starts it, reads the line that says it is ready, starts it again when it dies.

Knows nothing of what the child does. The thread that starts the child lives as long as the supervision, and the child
ends with that thread: a killed supervisor leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.errors import StartError, one_line

_DIE_WITH_PARENT = str(Path(__file__).with_name("die_with_parent.py"))
_FIRST_DELAY_S = 0.2
_LONGEST_DELAY_S = 10.0
_LAST_WORDS_BYTES = 16 * 1024  # of a child's log, in which its error is looked for
_MOST_LOG_BYTES = 64 * 1024 * 1024  # a longer log is kept once, as LOG.1, when the next child starts
_STEADY_S = 30.0  # a child that ran for so long starts again without delay

Ready = Mapping[str, Any]
"""The JSON object of the child's first line."""
Command = Callable[[Ready | None], Sequence[str]]
"""The command line, given what the child before said when it was ready (None: there was none)."""


class SupervisedProcess:
    """One child process and its successors."""

    def __init__(
        self, name: str, command: Command, environment: Mapping[str, str], log: Path, first_attempts: int = 1
    ) -> None:
        """first_attempts: starts that may fail before the first one that becomes ready."""
        self.name = name
        self._attempts_left = first_attempts
        self.num_restarts = 0
        self._command = command
        self._environment = dict(environment)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._ready: Ready | None = None
        self._failure = ""
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"supervise-{name}", daemon=True)

    def start(self) -> None:
        """Begin; does not wait for the child."""
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> Ready:
        """What the child said when it became ready.

        Raises StartError when its first start fails, or takes too long. A later start is tried again and again.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: self._ready is not None or self._failure, timeout=timeout_s)
            if self._ready is not None:
                return self._ready
            reason = self._failure if done else f"not ready after {timeout_s:.0f} s"
        raise StartError(f"{self.name}: {reason}")

    @property
    def pid(self) -> int | None:
        """The child that runs now."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def request_stop(self) -> None:
        """Ask the child to end (SIGTERM) and start no other; does not wait."""
        if self._stopping.is_set():
            return  # a second SIGTERM may mean "now"
        self._stopping.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()

    def stop(self, grace_s: float = 10.0) -> None:
        """End the child (SIGTERM, after the grace SIGKILL) and the supervision."""
        self.request_stop()
        process = self._process
        if process is not None:
            try:
                process.wait(grace_s)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    # ---- the supervising thread
    def _run(self) -> None:
        delay_s = 0.0
        while not self._stopping.wait(delay_s):
            began = time.monotonic()
            failure = self._run_child()
            if self._stopping.is_set():
                return
            if self._ready is None:
                self._attempts_left -= 1
                if self._attempts_left <= 0:
                    self._give_up(failure)
                    return
            self.num_restarts += 1
            steady = time.monotonic() - began > _STEADY_S
            delay_s = 0.0 if steady else min(_LONGEST_DELAY_S, max(_FIRST_DELAY_S, 2 * delay_s))

    def _give_up(self, failure: str) -> None:
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def _run_child(self) -> str:
        """Run one child to its end; says how it ended."""
        argv = [sys.executable, "-I", "-S", _DIE_WITH_PARENT, str(os.getpid()), *self._command(self._ready)]
        if self._log.exists() and self._log.stat().st_size > _MOST_LOG_BYTES:
            self._log.replace(self._log.with_name(f"{self._log.name}.1"))
        with self._log.open("ab") as log:
            begin = log.tell()
            try:
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=self._environment,
                    start_new_session=True,  # Ctrl-C is for us: we end our children in order
                )
            except OSError as error:
                return f"cannot be started ({error})"
        self._process = process
        if self._stopping.is_set():  # stop() may have looked before there was a child
            process.terminate()
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                self._take_line(line)
        code = process.wait()
        with self._log.open("rb") as log:
            log.seek(max(begin, self._log.stat().st_size - _LAST_WORDS_BYTES))
            said = log.read(_LAST_WORDS_BYTES).decode("utf-8", "replace")
        return one_line(said) if said.strip() else f"ended with exit code {code}"

    def _take_line(self, line: bytes) -> None:
        try:
            ready = json.loads(line)
        except ValueError:
            return
        if isinstance(ready, dict):
            with self._changed:
                self._ready = ready
                self._changed.notify_all()
