"""A real Prometheus and promtool, with a configuration as the Prometheus operator makes it of the chart's objects.

The programs are the machine's, or Debian's package unpacked into the user's cache folder: nothing is installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from platformdirs import user_cache_path

from tests.deploy.serving import LOOPBACK
from tests.helm.rendering import Manifest, of_kind, pods
from tests.processes import free_port, wait_until

Series = list[dict[str, Any]]


@dataclass(frozen=True)
class Programs:
    """What runs."""

    prometheus: str
    promtool: str


def programs() -> Programs:
    """Both programs; skips loudly where they cannot be had."""
    names = ("prometheus", "promtool")
    found = [shutil.which(name) for name in names]
    if None in found:
        folder = user_cache_path("switchyard") / "prometheus"
        problem = "" if (folder / "usr/bin/promtool").exists() else _unpack(folder)
        if problem:
            missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
            missing(f"NO PROMETHEUS, rules and dashboards have not met one: {problem}")
        found = [str(folder / "usr/bin" / name) for name in names]
    return Programs(str(found[0]), str(found[1]))


def _unpack(folder: Path) -> str:
    """Why Debian's package could not be unpacked there, or ""."""
    half = folder.with_name("prometheus.half")
    shutil.rmtree(half, ignore_errors=True)
    (half / "lists/partial").mkdir(parents=True)
    # The machine's lists may be missing or old: these are ours.
    apt = ["apt-get", "-qq", "-o", f"Dir::State::lists={half / 'lists'}", "-o", f"Dir::Cache={half}"]
    if os.getuid() == 0:
        apt += ["-o", "APT::Sandbox::User=root"]  # the usual user cannot write to this folder
    for command in ([*apt, "update"], [*apt, "download", "prometheus"], ["sh", "-c", "dpkg -x prometheus_*.deb ."]):
        try:
            done = subprocess.run(command, cwd=half, capture_output=True, text=True, check=False, timeout=300)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode != 0:
            return (done.stderr.strip().splitlines() or ["it failed"])[-1]
    shutil.rmtree(half / "lists")
    shutil.rmtree(folder, ignore_errors=True)
    half.rename(folder)
    return ""


@dataclass(frozen=True)
class Target:
    """What an endpoint of a monitor selects, and the labels by which the operator describes it."""

    component: str
    labels: dict[str, str]
    pod_labels: dict[str, str]


def scrape_configs(rendered: Sequence[Manifest], addresses: Mapping[str, str]) -> list[Manifest]:
    """One for each endpoint of each monitor.

    addresses: HOST:PORT by component, in place of the pods' own; a component that is not there has no targets.
    """
    found = []
    for monitor in of_kind(rendered, "ServiceMonitor", "PodMonitor"):
        spec = monitor["spec"]
        for number, endpoint in enumerate(spec.get("endpoints") or spec["podMetricsEndpoints"]):
            targets = [one for one in _selected(rendered, monitor, endpoint["port"]) if one.component in addresses]
            found.append(
                {
                    "job_name": f"{monitor['kind']}/{monitor['metadata']['name']}/{number}",
                    "metrics_path": endpoint.get("path", "/metrics"),
                    "scrape_interval": endpoint["interval"],
                    "scrape_timeout": endpoint["interval"],
                    "static_configs": [
                        {"targets": [addresses[one.component]], "labels": {**one.labels, **_discovered(one.pod_labels)}}
                        for one in targets
                    ],
                    "relabel_configs": [_as_prometheus(one) for one in endpoint.get("relabelings", [])],
                }
            )
    return found


def _discovered(pod_labels: Mapping[str, str]) -> dict[str, str]:
    """As service discovery names a pod's labels. KubeRay adds one to those that the chart sets."""
    known = {**pod_labels, "ray.io/cluster": "r-switchyard-abcde"}
    return {f"__meta_kubernetes_pod_label_{re.sub(r'[^a-zA-Z0-9_]', '_', key)}": text for key, text in known.items()}


def _as_prometheus(relabeling: Manifest) -> Manifest:
    """sourceLabels of the operator are source_labels of Prometheus."""
    return {re.sub(r"([A-Z])", lambda match: f"_{match[1].lower()}", key): value for key, value in relabeling.items()}


def _selected(rendered: Sequence[Manifest], monitor: Manifest, port: str) -> Iterator[Target]:
    selector, namespace = monitor["spec"]["selector"], monitor["metadata"]["namespace"]
    shared = {"namespace": namespace, "endpoint": port}
    if monitor["kind"] == "PodMonitor":
        job = f"{namespace}/{monitor['metadata']['name']}"
        for number, pod in enumerate(pods(rendered)):
            names = [one["name"] for one in pod.main.get("ports", [])]
            if fits(selector, pod.metadata["labels"]) and port in names:
                labels = {**shared, "pod": f"{pod.owner}-{number}", "container": pod.main["name"], "job": job}
                yield Target(pod.component, labels, pod.metadata["labels"])
        return
    for service in of_kind(rendered, "Service"):
        if port in [one["name"] for one in service["spec"]["ports"]] and fits(selector, service["metadata"]["labels"]):
            reached = {"matchLabels": service["spec"]["selector"]}
            (pod,) = [pod for pod in pods(rendered) if fits(reached, pod.metadata["labels"])]
            name = service["metadata"]["name"]
            labels = {**shared, "service": name, "job": name, "pod": f"{name}-0", "container": pod.main["name"]}
            yield Target(pod.component, labels, pod.metadata["labels"])


def fits(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """Whether a selector takes an object with these labels."""
    equal = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    expressions = selector.get("matchExpressions", [])
    assert all(one["operator"] == "In" for one in expressions)
    return equal and all(labels.get(one["key"]) in one["values"] for one in expressions)


class Prometheus:
    """The server on loopback, with its data in a folder."""

    def __init__(self, made: Programs, folder: Path) -> None:
        self._programs, self._folder = made, folder
        self.address = f"127.0.0.1:{free_port()}"
        self._rules, self._config = folder / "rules.yaml", folder / "prometheus.yaml"
        self._process: subprocess.Popen[bytes] | None = None

    def write(self, groups: Sequence[Manifest], scrapes: Sequence[Manifest]) -> None:
        """The files that it reads when it starts. groups: of a PrometheusRule."""
        self._rules.write_text(yaml.safe_dump({"groups": list(groups)}))
        config = {
            "global": {"evaluation_interval": "1s"},
            "rule_files": [str(self._rules)],
            "scrape_configs": list(scrapes),
        }
        self._config.write_text(yaml.safe_dump(config))

    def checked(self) -> str:
        """What promtool says of the files."""
        return self._promtool("check", "rules", str(self._rules)) + self._promtool("check", "config", str(self._config))

    def _promtool(self, *arguments: str) -> str:
        """What it prints; fails where it finds fault."""
        done = subprocess.run(
            [self._programs.promtool, *arguments], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self) -> None:
        """Until it answers."""
        command = [self._programs.prometheus, f"--config.file={self._config}", f"--web.listen-address={self.address}"]
        command.append(f"--storage.tsdb.path={self._folder / 'data'}")
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder)
        wait_until(self._is_ready, "Prometheus answers")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "log").read_text()
        try:
            with LOOPBACK.open(f"http://{self.address}/-/ready", timeout=5):
                return True
        except OSError:
            return False

    def _get(self, path: str, **query: str) -> Any:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with LOOPBACK.open(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from None

    def query(self, expression: str) -> Series:
        """The series of an expression, now."""
        return list(self._get("query", query=expression)["result"])

    def targets(self) -> dict[str, str]:
        """Health of each target, by its URL."""
        return {
            one["scrapeUrl"]: f"{one['health']} {one['lastError']}".strip()
            for one in self._get("targets")["activeTargets"]
        }

    def alert_states(self) -> dict[str, str]:
        """pending or firing, by the alert's name; those that are neither are left out."""
        return {one["labels"]["alertname"]: one["state"] for one in self._get("alerts")["alerts"]}
