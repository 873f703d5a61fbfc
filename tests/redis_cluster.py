"""A real Redis cluster for tests: three masters without replicas, each a process that a test may kill."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS

from tests.processes import free_port, wait_until

PASSWORD = "hush"


class RedisClusterServers:
    """Started when it is made. Slots are shared out evenly, and what is left of the cluster goes on serving them."""

    def __init__(self, executable: str, num_nodes: int = 3) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rc-"))
        self.ports = [_free_ports() for _ in range(num_nodes)]
        self._processes = [self._start(executable, port) for port in self.ports]
        self.clients = [redis.Redis(port=port, password=PASSWORD) for port in self.ports]
        self.url = "redis+cluster://:{}@{}".format(PASSWORD, ",".join(f"127.0.0.1:{port}" for port in self.ports))
        for client in self.clients:
            wait_until(lambda client=client: _answers(client), "a node of the cluster answers")  # type: ignore[misc]
        bounds = [REDIS_CLUSTER_HASH_SLOTS * i // num_nodes for i in range(num_nodes + 1)]
        for client, first, end in zip(self.clients, bounds, bounds[1:], strict=False):
            client.execute_command("CLUSTER ADDSLOTS", *range(first, end))
        for port in self.ports[1:]:
            self.clients[0].execute_command("CLUSTER MEET", "127.0.0.1", port)
        for client in self.clients:
            wait_until(lambda client=client: self._is_whole(client), "the cluster is whole")  # type: ignore[misc]

    def _start(self, executable: str, port: int) -> subprocess.Popen[bytes]:
        folder = self._folder / str(port)
        folder.mkdir()
        command = [executable, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        command += ["--cluster-enabled", "yes", "--cluster-node-timeout", "30000", "--dir", str(folder)]
        command += ["--cluster-require-full-coverage", "no", "--requirepass", PASSWORD, "--masterauth", PASSWORD]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def _is_whole(self, client: redis.Redis) -> bool:
        slots = client.execute_command("CLUSTER SLOTS")
        owned = sum(last + 1 - first for first, last, *_ in slots)
        info = client.execute_command("CLUSTER INFO")
        state = info if isinstance(info, dict) else dict(line.split(":") for line in info.decode().split())
        return owned == REDIS_CLUSTER_HASH_SLOTS and state["cluster_state"] == "ok"

    def _owner_of(self, slot: int, client: redis.Redis) -> bytes:
        ranges = client.execute_command("CLUSTER SLOTS")
        return next(owner[2] for first, last, owner, *_ in ranges if first <= slot <= last)

    def kill(self, number: int) -> None:
        """SIGKILL; what it had is lost."""
        self._processes[number].kill()
        self._processes[number].wait()

    def move_slot(self, slot: int, source: int, target: int) -> None:
        """Everything in this slot, and then the slot, as `redis-cli --cluster reshard` does.

        Not before all nodes agree on who has it now: else an earlier move wins over this one.
        """
        wait_until(lambda: len({self._owner_of(slot, client) for client in self.clients}) == 1, "the nodes agree")
        ids = [client.execute_command("CLUSTER MYID").decode() for client in self.clients]
        self.clients[target].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
        self.clients[source].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[target])
        while keys := self.clients[source].execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            address = ("127.0.0.1", self.ports[target])
            self.clients[source].execute_command("MIGRATE", *address, "", 0, 5000, "AUTH", PASSWORD, "KEYS", *keys)
        for number in (target, source):
            self.clients[number].execute_command("CLUSTER SETSLOT", slot, "NODE", ids[target])

    def close(self) -> None:
        """Ends every node."""
        for client in self.clients:
            client.close()
        for process in self._processes:
            process.kill()
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_ports() -> int:
    """A port that is free together with the one that nodes talk to each other on."""
    while True:
        port = free_port()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            return port


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False
