"""Check 28 of the chart: rules and dashboards name what is exported, and runbooks that exist."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from deploy.actors.metrics import exported_names
from deploy.config import ROOT
from telemetry import autoscaler, node, router, worker
from telemetry.metric import Kind, Metric
from tests.helm.rendering import CHART, Manifest, objects, of_kind, text_of

RUNBOOKS = ROOT / "deploy" / "runbooks"
DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))
_MADE_BY_PROMETHEUS = {"namespace", "pod", "le"}


def on_routers(metric: Metric) -> set[str]:
    if metric.kind is Kind.HISTOGRAM:
        return {f"{metric.name}_{end}" for end in ("bucket", "sum", "count")}
    return {metric.name}


EXPORTED = {
    name for metric in (*router.METRICS, *worker.ROUTER_METRICS, *autoscaler.METRICS) for name in on_routers(metric)
} | {name for metric in (*worker.RAY_METRICS, *node.METRICS) for name in exported_names(metric)}
LABELS = {
    label
    for metric in (*router.METRICS, *worker.ROUTER_METRICS, *node.METRICS, *autoscaler.METRICS)
    for label in metric.labels
}


def rules() -> list[Manifest]:
    (found,) = of_kind(objects("disaggregated"), "PrometheusRule")
    return [rule for group in found["spec"]["groups"] for rule in group["rules"]]


def expressions() -> dict[str, list[str]]:
    found = {rule["alert"]: [rule["expr"]] for rule in rules()}
    for path in DASHBOARDS:
        panels = json.loads(path.read_text())["panels"]
        found[path.stem] = [target["expr"] for panel in panels for target in panel["targets"]]
    return found


@pytest.mark.parametrize("source", sorted(expressions()))
def test_check_28_expressions_name_exported_metrics(source: str) -> None:
    for expression in expressions()[source]:
        named = set(re.findall(r"\b(?:ray_)?switchyard_\w+", expression))
        assert named, expression
        assert named <= EXPORTED
        used = set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", expression))
        for group in re.findall(r"by \(([^)]*)\)", expression):
            used |= set(group.replace(" ", "").split(","))
        assert used <= LABELS | _MADE_BY_PROMETHEUS, expression
        assert expression.count("(") == expression.count(")")


def test_alerts_link_to_runbooks_that_exist() -> None:
    assert len(rules()) > 10
    for rule in rules():
        folder, _, name = rule["annotations"]["runbook_url"].rpartition("/")
        assert folder == "https://runbooks.example/switchyard"
        text = (RUNBOOKS / name).read_text()
        named = rule["alert"]
        assert f"`{named}`" in text, f"{name} does not name {named}"
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_the_alert_about_failures_counts_those_that_are_the_clusters_fault() -> None:
    (rule,) = [rule for rule in rules() if rule["alert"] == "SwitchyardRequestsFail"]
    (counted,) = re.findall(r'outcome=~"([^"]*)"', rule["expr"])
    assert counted.split("|") == list(router.FAILURES)


def test_runbooks_name_alerts_and_values_that_exist() -> None:
    alerts = {rule["alert"] for rule in rules()}
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == {
        "upgrade",
        "drain",
        "rollback",
        "ttft-is-up",
        "kv-is-not-moving",
        "pool-does-not-start",
    }
    for path in RUNBOOKS.glob("*.md"):
        named = set(re.findall(r"`(Switchyard[A-Z]\w+)`", path.read_text()))
        assert named <= alerts, path
        titles = {panel["title"] for board in DASHBOARDS for panel in json.loads(board.read_text())["panels"]}
        text = re.sub(r"\s+", " ", path.read_text())
        for quoted in re.findall(r'"([A-Z][a-z]+ [^":.]{4,60})"', text):
            assert any(title.startswith(quoted) for title in titles), f"{path.name}: {quoted}"


def test_an_alert_can_be_left_out() -> None:
    assert "SwitchyardTimeToFirstTokenHigh" in text_of("disaggregated")
    assert "alert: SwitchyardTimeToFirstTokenHigh" not in text_of("gitops")
    assert "alert: SwitchyardNoDecode" in text_of("gitops")


def test_alerts_are_about_the_releases_namespace() -> None:
    for rule in rules():
        assert 'namespace="prod"' in rule["expr"]


def test_the_dashboards_are_printed_as_they_are() -> None:
    assert [path.stem for path in DASHBOARDS] == ["capacity", "engine", "operators"]
    (printed,) = [i for i in of_kind(objects("disaggregated"), "ConfigMap") if "engine.json" in i["data"]]
    assert printed["metadata"]["labels"]["grafana_dashboard"] == "1"
    for path in DASHBOARDS:
        assert json.loads(printed["data"][path.name]) == json.loads(path.read_text())


def test_panels_do_not_overlap() -> None:
    uids = []
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        uids.append(dashboard["uid"])
        panels = dashboard["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    assert len(set(uids)) == len(uids)


def test_the_alerts_are_yaml_without_templates() -> None:
    read = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    assert {group["name"] for group in read["groups"]} == {
        "switchyard.requests",
        "switchyard.pools",
        "switchyard.kv",
        "switchyard.autoscaler",
    }
