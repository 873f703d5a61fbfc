"""Workers, routers and nodes as processes of their own, forked from one that has imported everything: tests.prefork."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.processes import DEADLINE_S, REPOSITORY, KVNode, python_environment, wait_until

SECRET = "of the tests"  # of the tiers outside of a host's memory


class Prefork:
    """The process that forks servers. enter: a command line that runs another one elsewhere, in a namespace."""

    def __init__(self, enter: Sequence[str] = ()) -> None:
        environment = {**python_environment(), "OMP_NUM_THREADS": "1"}
        command = [*enter, sys.executable, "-m", "tests.prefork"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY
        )
        self._lock = threading.Lock()
        self._answer()

    def fork(self, program: str, spec: Path, output: Path, errors: Path) -> int:
        """The pid of a new server."""
        order = {"program": program, "spec": str(spec), "output": str(output), "errors": str(errors)}
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def close(self) -> None:
        """Ends it, and with it whatever it has forked."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(DEADLINE_S)
        self._process.stdout.close()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the forking process ended"
        pid: int = json.loads(line)["pid"]
        return pid


class Server:
    """One worker, router or node."""

    def __init__(self, prefork: Prefork, program: str, name: str, folder: Path) -> None:
        self.name = name
        self.program = program
        self.errors = folder / f"{name}.log"
        self.pid = 0
        self.ready: dict[str, str] = {}
        self._prefork = prefork
        self._folder = folder
        self._pidfd = -1
        self._num_starts = 0

    def start(self, spec: object) -> None:
        """Fork it; `wait_ready` follows."""
        self._num_starts += 1
        path, self._output = self._folder / f"{self.name}.json", self._folder / f"{self.name}.{self._num_starts}.out"
        path.write_text(json.dumps(spec))
        if self._num_starts > 1:
            self.errors.rename(self.errors.with_suffix(f".{self._num_starts - 1}.log"))
        self.pid = self._prefork.fork(self.program, path, self._output, self.errors)
        self._pidfd = os.pidfd_open(self.pid)

    def wait_ready(self) -> dict[str, str]:
        """What it said when it served."""
        wait_until(lambda: self._has_said() or not self.is_running, f"{self.name} says that it serves")
        assert self._has_said(), f"{self.name} ended while it was started: {self.errors.read_text()}"
        self.ready = json.loads(self._output.read_text())
        assert "refused" not in self.ready, self.ready
        return self.ready

    def _has_said(self) -> bool:
        return self._output.exists() and self._output.read_text().endswith("\n")

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._pidfd >= 0 and not select.select([self._pidfd], [], [], 0)[0]

    def signal(self, number: signal.Signals) -> None:
        """SIGSTOP, SIGCONT and the like."""
        if self._pidfd >= 0:
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """SIGKILL: nothing is cleaned up."""
        self.end(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM, and wait."""
        self.end(signal.SIGTERM)

    def end(self, number: signal.Signals) -> None:
        """Send a signal that ends it, and wait."""
        if self._pidfd < 0:
            return
        if self.is_running:
            signal.pidfd_send_signal(self._pidfd, number)
        ended = select.select([self._pidfd], [], [], DEADLINE_S)[0]
        assert ended, f"{self.name} did not end"
        os.close(self._pidfd)
        self._pidfd = -1


class ForkedNode(KVNode):
    """A KV node that is forked instead of being started from the beginning."""

    def __init__(
        self,
        prefork: Prefork,
        folder: Path,
        slot_bytes: int,
        num_slots: int,
        name: str = "node",
        options: Mapping[str, object] | None = None,
    ) -> None:
        self.server = Server(prefork, "node", name, folder)
        super().__init__(f"fake-{uuid.uuid4().hex[:12]}", slot_bytes, num_slots, options, secret=SECRET)

    @property
    def pid(self) -> int:
        """Of the running process."""
        return self.server.pid

    def start(self) -> None:
        """Forks the process and waits for its ready line."""
        self.server.start(self.spec())
        self.ready = dict(self.server.wait_ready())

    def _end(self, number: signal.Signals) -> int:
        self.server.end(number)
        return 0
