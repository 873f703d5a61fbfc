"""Ray's dashboard on the head finds Grafana and Prometheus where the values say."""

from __future__ import annotations

from typing import Any

import pytest
from ray.dashboard.modules.metrics import metrics_head

from tests.helm.rendering import Manifest, objects, of_kind, pods, refusal

KEY = "monitoring.rayDashboard"
GRAFANA, BROWSER = "http://grafana.monitoring:3000", "https://grafana.example/ops"
PROMETHEUS = "https://prometheus.monitoring"
BOTH = (f"{KEY}.grafanaHost={GRAFANA}", f"{KEY}.prometheusHost={PROMETHEUS}")


def environments(settings: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Names that Ray's dashboard reads, by component."""
    found: dict[str, dict[str, Any]] = {}
    for pod in pods(objects("disaggregated", settings)):
        named = {one["name"]: one.get("value") for one in pod.main["env"]}
        seen = {name: value for name, value in named.items() if name.startswith(("RAY_GRAFANA", "RAY_PROMETHEUS"))}
        if seen:
            found[pod.component] = seen
    return found


def head_egress(settings: tuple[str, ...]) -> list[Manifest]:
    policies = of_kind(objects("locked-down", settings), "NetworkPolicy")
    (policy,) = [one for one in policies if one["metadata"]["name"].endswith("-head")]
    return list(policy["spec"]["egress"])


def test_only_the_head_is_told() -> None:
    assert environments(()) == {}
    assert environments((*BOTH, f"{KEY}.grafanaIframeHost={BROWSER}")) == {
        "head": {
            "RAY_GRAFANA_HOST": GRAFANA,
            "RAY_GRAFANA_IFRAME_HOST": BROWSER,
            "RAY_GRAFANA_ORG_ID": "1",
            "RAY_PROMETHEUS_HOST": PROMETHEUS,
            "RAY_PROMETHEUS_NAME": "Prometheus",
        }
    }


def test_browsers_go_where_the_head_goes_unless_told() -> None:
    assert environments(BOTH)["head"]["RAY_GRAFANA_IFRAME_HOST"] == GRAFANA


def test_ray_reads_these_names() -> None:
    read = {value for name, value in vars(metrics_head).items() if name.endswith("_ENV_VAR")}
    assert set(environments(BOTH)["head"]) <= read


def test_the_heads_policy_lets_it_ask() -> None:
    more = [rule for rule in head_egress(BOTH) if rule not in head_egress(())]
    assert more == [{"ports": [{"port": 3000, "protocol": "TCP"}, {"port": 443, "protocol": "TCP"}]}]


def test_grafana_alone_is_refused() -> None:
    assert f"{KEY}.prometheusHost: needed with grafanaHost" in refusal("cpu", BOTH[0])


@pytest.mark.parametrize("url", ["grafana:3000", "http://me:secret@grafana", "http://grafana/", "http://grafana//x"])
def test_other_urls_are_refused(url: str) -> None:
    assert "rayDashboard" in refusal("cpu", f"{KEY}.grafanaHost={url}", BOTH[1])


def test_rays_pods_carry_the_name_of_their_cluster() -> None:
    (monitor,) = of_kind(objects("disaggregated"), "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (relabeling,) = endpoint["relabelings"]
    assert relabeling["targetLabel"] == "ray_io_cluster"
