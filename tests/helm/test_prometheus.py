"""A real Prometheus scrapes a running cluster as the chart's monitors say: each alert and each panel finds its data.

In place of pods there is `switchyard serve` with the fake engine; Ray's metrics port stands for those of all Ray pods.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from deploy.host import free_port
from tests.deploy.conftest import write_tiny_model
from tests.deploy.serving import LOOPBACK, SWITCHYARD, Serving, Surroundings
from tests.helm.prometheus import Prometheus, programs, scrape_configs
from tests.helm.rendering import CHART, Manifest, objects, of_kind, pods
from tests.processes import RedisServer, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.redis, pytest.mark.timeout(300), pytest.mark.xdist_group("prometheus")]

SETTINGS = ("monitoring.interval=1s",)
_FIRST = "Ray's Counter takes no zero: its series begins with the first event, and none happens here"
NOT_HERE = {
    # Metric, and why it has no data in this test.
    "switchyard_worker_rejected_fragments_total": "begins, with its reason, when the first fragment is rejected",
    **dict.fromkeys(
        (
            "ray_switchyard_node_rejected_fragments_total",
            "ray_switchyard_node_disk_rejected_fragments_total",
            "ray_switchyard_node_disk_read_fragments_total",
            "ray_switchyard_node_disk_refused_fragments_total",
            "ray_switchyard_node_promoted_fragments_total",
            "ray_switchyard_node_late_promotions_total",
            "ray_switchyard_worker_moved_requests_total",
            "ray_switchyard_worker_recomputed_prompt_tokens_total",
            "ray_switchyard_worker_preemptions_total",
            "ray_switchyard_worker_swaps_total",
            "ray_switchyard_worker_recomputes_total",
            "ray_switchyard_worker_prefixes_fetched_total",
            "ray_switchyard_worker_prefixes_recomputed_total",
            "ray_switchyard_worker_dropped_write_back_blocks_total",
        ),
        _FIRST,
    ),
}
"""What has no data here. No expression of the chart asks for metrics of kube-state-metrics, DCGM or KubeRay."""


def rendered() -> tuple[Manifest, ...]:
    return objects("disaggregated", SETTINGS)


def groups() -> list[Manifest]:
    (found,) = of_kind(rendered(), "PrometheusRule")
    return list(found["spec"]["groups"])


def without_comparison(expression: str) -> str:
    """What an alert measures: its expression without the bound, or what must not be absent."""
    absent = re.fullmatch(r"absent\((.*)\)", expression, re.S)
    if absent:
        return absent[1]
    return re.sub(r"\s*(?:>=|<=|==|>|<)\s*[\d.]+$", "", expression)


def expressions() -> dict[str, str]:
    """What must return data, by where it stands."""
    found = {f"alert {rule['alert']}": without_comparison(rule["expr"]) for g in groups() for rule in g["rules"]}
    for path in sorted((CHART / "dashboards").glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel["targets"]:
                text = target["expr"].replace("$__rate_interval", "1m")
                found[f"{path.stem}: {panel['title']} {target['refId']}"] = re.sub(r"\$(namespace|pool)\b", ".*", text)
    (scaled,) = of_kind(rendered(), "ScaledObject")
    found["KEDA"] = scaled["spec"]["triggers"][0]["metadata"]["query"]
    assert not [text for text in found.values() if "$" in text]
    return found


@dataclass
class Watched:
    """A cluster and the Prometheus that watches it."""

    serving: Serving
    prometheus: Prometheus
    ray_dashboard: str
    """HOST:PORT."""


class Grafana(BaseHTTPRequestHandler):
    """All that Ray asks of one."""

    def do_GET(self) -> None:
        body = b'{"database": "ok"}' if self.path == "/api/health" else b""
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Traffic(threading.Thread):
    """Completions one after the other, each with a prompt of its own, until stopped."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self._url = f"http://{address}/v1/completions"
        self.has_ended = threading.Event()
        self.num_done = 0
        self.start()

    def run(self) -> None:
        while not self.has_ended.is_set():
            prompt = (
                f"{self.num_done // 2} " + "def walk(tree): yield from sorted(tree)\n" * 6
            )  # every second one is known
            body = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 8, "ignore_eos": True}).encode()
            request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
            try:
                with LOOPBACK.open(request, timeout=30) as answer:
                    answer.read()
                    self.num_done += 1
            except OSError:
                time.sleep(0.2)


@pytest.fixture(scope="module")
def grafana() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Grafana)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def watched(redis_process: RedisServer, grafana: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    if not redis_process.is_running:  # a test before killed it
        redis_process.start()
    prometheus = Prometheus(programs(), tmp_path_factory.mktemp("prometheus"))
    folder = Path(tempfile.mkdtemp(prefix="sym-", dir="/tmp"))  # a short path: Ray makes sockets far below it
    surroundings = Surroundings(folder, write_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))
    metrics, dashboard = f"127.0.0.1:{free_port('127.0.0.1', 20500)}", f"127.0.0.1:{free_port('127.0.0.1', 21500)}"
    secret = tmp_path_factory.mktemp("secret") / "secret"
    secret.write_text("a secret of many characters")
    of_cluster = [
        "name=watched",
        f"kvstore.control={redis_process.url}",
        f"kvstore.tier={redis_process.url}",
        f"kvstore.tier_secret_file={secret}",
        "kvstore.disk_bytes=16777216",
        f"kvstore.disk_dir={tmp_path_factory.mktemp('disk')}",
        "kvstore.disk_write=through",
        "autoscaling.mode=advise",
    ]
    of_ray = [
        f"ray.metrics_export_port={metrics.rpartition(':')[2]}",
        "ray.dashboard=true",
        f"ray.dashboard_port={dashboard.rpartition(':')[2]}",
        "engine.fake_step_s=0.002",
    ]
    command = surroundings.command(settings=[*of_cluster, *of_ray])
    environment = head_environment(grafana, f"http://{prometheus.address}")
    serving = Serving(command, tmp_path_factory.mktemp("cwd"), environment)
    traffic, scaler = Traffic(serving.router["http"]), None
    try:
        scaler = Autoscaler(tmp_path_factory.mktemp("autoscaler"), f"http://{dashboard}", of_cluster)
        addresses = {"router": serving.router["http"], "worker": metrics, "autoscaler": scaler.address}
        prometheus.write(quick(groups()), scrape_configs(rendered(), addresses))
        prometheus.start()
        yield Watched(serving, prometheus, dashboard)
    finally:
        traffic.has_ended.set()
        prometheus.stop()
        if scaler is not None:
            scaler.stop()
        serving.close()
        shutil.rmtree(folder, ignore_errors=True)


class Autoscaler:
    """`switchyard autoscaler`, which only advises; its lock is in Redis, as there is no Kubernetes."""

    def __init__(self, folder: Path, ray_dashboard: str, settings: Sequence[str]) -> None:
        self.address = f"127.0.0.1:{free_port('127.0.0.1', 22500)}"
        config = folder / "cluster.yaml"
        config.write_text("{}\n")
        options = ["--config", str(config), "--ray-dashboard", ray_dashboard, "--port", self.address.rpartition(":")[2]]
        options += [part for setting in settings for part in ("--set", setting)]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen([SWITCHYARD, "autoscaler", *options], stdout=log, stderr=log, cwd=folder)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(30)


def head_environment(grafana: str, prometheus: str) -> dict[str, str]:
    """What the chart gives the head so that Ray's dashboard finds both."""
    key = "monitoring.rayDashboard"
    items = objects("disaggregated", (f"{key}.grafanaHost={grafana}", f"{key}.prometheusHost={prometheus}"))
    (head,) = [pod for pod in pods(items) if pod.component == "head"]
    named = {one["name"]: one.get("value", "") for one in head.main["env"]}
    return {name: value for name, value in named.items() if name.startswith(("RAY_GRAFANA", "RAY_PROMETHEUS"))}


def quick(given: list[Manifest]) -> list[Manifest]:
    """The rules with 3 s in place of minutes before they fire."""
    return [{**group, "rules": [{**rule, "for": "3s"} for rule in group["rules"]]} for group in given]


def numbers(prometheus: Prometheus, expression: str) -> list[float]:
    found = [float(series["value"][1]) for series in prometheus.query(expression)]
    return [number for number in found if not math.isnan(number)]


def test_promtool_accepts_rules_and_configuration(watched: Watched) -> None:
    said = watched.prometheus.checked()
    print(said)
    num_rules = sum(len(group["rules"]) for group in groups())
    assert f"{num_rules} rules found" in said


def test_each_expression_finds_data(watched: Watched) -> None:
    prometheus = watched.prometheus
    wait_until(lambda: len(prometheus.targets()) >= 3, "there are targets")
    wait_until(lambda: set(prometheus.targets().values()) == {"up"}, "all targets are up")
    missing: dict[str, str] = {}
    deadline_s = time.monotonic() + 40
    while time.monotonic() < deadline_s:
        missing = {where: text for where, text in expressions().items() if not numbers(prometheus, text)}
        if not unexplained(missing):
            break
        time.sleep(1)
    assert unexplained(missing) == {}
    print(f"{len(expressions())} expressions, {len(missing)} of them without data for known reasons")


def unexplained(missing: dict[str, str]) -> dict[str, str]:
    return {where: text for where, text in missing.items() if not set(re.findall(r"\w+", text)) & NOT_HERE.keys()}


def test_series_carry_what_the_monitors_set(watched: Watched) -> None:
    for metric, service in (
        ("switchyard_inflight_requests", "r-switchyard-router"),
        ("ray_switchyard_node_disk_up", None),
    ):
        for series in watched.prometheus.query(metric):
            labels = series["metric"]
            assert labels["namespace"] == "prod"
            assert labels.get("service") == service
            assert labels.get("ray_io_cluster") == (None if service else "r-switchyard-abcde")
            assert not [name for name in labels if name.startswith("exported_")], "a label of ours is the operator's"


def test_rays_dashboard_reaches_grafana_and_prometheus(watched: Watched, grafana: str) -> None:
    found = {}
    for name in ("grafana", "prometheus"):
        with LOOPBACK.open(f"http://{watched.ray_dashboard}/api/{name}_health", timeout=30) as answer:
            found[name] = json.load(answer)
    assert found["prometheus"]["result"], found
    said = found["grafana"]["data"]
    assert (said["grafanaHost"], said["dashboardDatasource"]) == (grafana, "Prometheus")
    # The uids under which it looks for panels, as the chart's README says.
    uids = said["dashboardUids"]
    assert (uids["default"], uids["serve"], uids["serveDeployment"]) == (
        "rayDefaultDashboard",
        "rayServeDashboard",
        "rayServeDeploymentDashboard",
    )


def test_an_alert_fires_when_the_workers_are_gone(watched: Watched) -> None:
    """Last in this file: the cluster does not come back."""
    prometheus = watched.prometheus
    assert prometheus.alert_states() == {}
    kill_workers(watched.serving)
    seen: dict[str, list[str]] = {}

    def fires() -> bool:
        for name, state in prometheus.alert_states().items():
            states = seen.setdefault(name, [])
            if not states or states[-1] != state:
                states.append(state)
        return all("firing" in seen.get(name, []) for name in ("SwitchyardNoPrefill", "SwitchyardNoDecode"))

    wait_until(fires, "the alerts fire")
    assert seen["SwitchyardNoDecode"] == seen["SwitchyardNoPrefill"] == ["pending", "firing"]
    print(seen)


def kill_workers(serving: Serving) -> None:
    """All of the cluster but its router, which goes on; what would end the router with them is stopped."""
    main = psutil.Process(serving.process.pid)
    (router,) = [one for one in serving.below() if "router" in one.cmdline()]
    kept = [router, *router.parents()]
    rest = [one for one in serving.below() if one not in kept]
    for process in (main, *rest):
        process.suspend()
    for process in rest:
        process.kill()
