"""Checks 4, 5 and 22 of the chart: custom objects, pods inside them, and values."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from deploy import chart
from deploy import config as deploy_config
from tests.helm.rendering import (
    CHART,
    PROFILES,
    cluster_yaml,
    is_core,
    objects,
    parse,
    pods,
    ray_service,
    refusal,
    template,
)
from tests.helm.schemas import core_problems, custom_definitions, custom_problems

each_profile = pytest.mark.parametrize("profile", PROFILES)


@each_profile
def test_check_4_custom_objects_fit_their_definitions(profile: str) -> None:
    custom = [item for item in objects(profile) if not is_core(item)]
    assert custom
    for item in custom:
        assert custom_problems(item) == [], item["kind"]


def test_check_4_every_definition_is_used_by_a_profile() -> None:
    used = {(item["apiVersion"], item["kind"]) for profile in PROFILES for item in objects(profile)}
    kinds = {kind for _, kind in custom_definitions()} - {"RayCluster"}  # read for its lack of a scale subresource
    assert {kind for _, kind in used} >= kinds


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "minReplica"), 1),
        (("spec", "rayClusterConfig", "autoscalerOptions", "version"), "v3"),
        (("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "container"), []),
        (("spec", "upgradeStrategy", "type"), 1),
    ],
)
def test_check_4_a_typing_error_is_found(path: tuple[str | int, ...], value: object) -> None:
    item: Any = copy.deepcopy(ray_service(objects("tp-pp")))
    branch = item
    for part in path[:-1]:
        branch = branch[part]
    branch[path[-1]] = value
    assert custom_problems(item)


@each_profile
@pytest.mark.parametrize("version", ["1.29", "1.34"])
def test_check_5_pods_inside_other_objects_fit_the_schema(profile: str, version: str) -> None:
    made = pods(objects(profile))
    assert {"router", "head", "worker", "test"} <= {pod.component for pod in made}
    for pod in made:
        assert core_problems(pod.lifted(), version) == [], pod.owner


def test_check_22_the_values_schema_is_fresh() -> None:
    """`python -m deploy.chart schema > helm/switchyard/values.schema.json`"""
    assert json.loads((CHART / "values.schema.json").read_text()) == chart.schema()


def test_check_22_the_table_of_values_is_fresh() -> None:
    """`python -m deploy.chart readme`"""
    readme = (CHART / "README.md").read_text()
    assert readme == chart.with_table(readme)


def test_check_22_every_value_has_a_meaning() -> None:
    rows = [line.strip("| ").split(" | ") for line in chart.table().splitlines()[2:]]
    assert len(rows) > 100
    for row in rows:
        assert len(row) == 3, row
        assert row[2].endswith("."), row


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("foo=1", "Additional property foo is not allowed"),
        ("pools.decode.memroy=1Gi", "pools.decode: Additional property memroy is not allowed"),
        ("cluster.foo=1", "cluster: Additional property foo is not allowed"),
        ("cluster.pools.decode.tpp=1", "cluster.pools.decode: Additional property tpp is not allowed"),
        ("cluster.pools.decode.role=both", "cluster.pools.decode.role must be one of the following"),
        ("cluster.pools.decode.tp=two", "cluster.pools.decode.tp: Invalid type. Expected: integer, given: string"),
        ("cluster.pools.decode.tp=-2", "cluster.pools.decode.tp: Must be greater than or equal to 1"),
        ("cluster.pools.decode.pp=0", "cluster.pools.decode.pp: Must be greater than or equal to 1"),
        ("cluster.pools.decode.device=tpu", "cluster.pools.decode.device must be one of the following"),
        ("cluster.autoscaling.slo_ttft_quantile=2", "cluster.autoscaling.slo_ttft_quantile: Must be less than 1"),
        ("cluster.autoscaling.interval_s=0", "cluster.autoscaling.interval_s: Must be greater than 0"),
        ("cluster.autoscaling.policy=hpa", "cluster.autoscaling.policy must be one of the following"),
        ("cluster.kvstore.disk_bytes=5", "cluster.kvstore.disk_bytes: Must"),
        ("cluster.kvstore.arena_dir=shm", "cluster.kvstore.arena_dir: Does not match pattern"),
        ("cluster.router.window_tokens=0", "cluster.router.window_tokens: Must be greater than or equal to 1"),
        ("router.replicas=0", "router.replicas: Must be greater than or equal to 1"),
        ("router.autoscaling.kind=vpa", "router.autoscaling.kind must be one of the following"),
        ("podDefaults.tolerations.a=b", "podDefaults.tolerations: Invalid type. Expected: array"),
    ],
)
def test_check_22_a_wrong_key_or_value_is_refused_with_its_path(setting: str, message: str) -> None:
    assert message in refusal("disaggregated", setting)


def test_an_unquoted_off_is_off(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text("cluster: {autoscaling: {mode: off}}")
    done = template("cpu", more=["-f", str(values)])
    assert done.returncode == 0, done.stderr
    assert deploy_config.parse(cluster_yaml(parse(done.stdout))).autoscaling.mode == "off"
