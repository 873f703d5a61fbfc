"""Checks 1-3 and 23-27 of the chart: what helm makes of each profile, always alike, wherever it is rendered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy import config
from tests.helm.rendering import (
    CHART,
    PROFILES,
    cluster_yaml,
    is_core,
    objects,
    of_kind,
    parse,
    run_helm,
    template,
    text_of,
)
from tests.helm.schemas import core_problems, custom_definitions

IMMUTABLE = Path(__file__).parent / "immutable.json"
each_profile = pytest.mark.parametrize("profile", PROFILES)


def test_there_are_the_promised_profiles() -> None:
    assert set(PROFILES) == {"cpu", "single-gpu", "tp", "tp-pp", "disaggregated", "locked-down", "gitops"}


@each_profile
def test_check_1_lint_is_strict_and_content(profile: str) -> None:
    done = run_helm("lint", "--strict", str(CHART), "-f", str(CHART / "ci" / f"{profile}-values.yaml"))
    assert done.returncode == 0, done.stdout


@each_profile
def test_check_2_two_renders_have_the_same_bytes(profile: str) -> None:
    assert template(profile).stdout == text_of(profile)


@each_profile
@pytest.mark.parametrize("version", ["1.29", "1.34"])
def test_check_3_core_objects_fit_the_schema(profile: str, version: str) -> None:
    for item in objects(profile):
        if is_core(item):
            assert core_problems(item, version) == [], item["metadata"]["name"]
        else:
            assert (item["apiVersion"], item["kind"]) in custom_definitions()


def test_check_3_the_schema_finds_a_wrong_field() -> None:
    (service, *_) = of_kind(objects("cpu"), "Service")
    assert core_problems({**service, "spec": {**service["spec"], "port": []}}, "1.34")


def test_check_23_without_options_there_are_only_core_and_ray_kinds() -> None:
    kinds = {(item["apiVersion"].partition("/")[0], item["kind"]) for item in objects("cpu")}
    assert ("ray.io", "RayService") in kinds
    assert {group for group, _ in kinds} == {"v1", "apps", "policy", "rbac.authorization.k8s.io", "ray.io"}


@each_profile
def test_check_24_what_the_cluster_knows_changes_no_object(profile: str) -> None:
    known = [f"{version}/{kind}" for version, kind in custom_definitions()] + [v for v, _ in custom_definitions()]
    done = template(profile, more=[part for name in known for part in ("--api-versions", name)])
    assert done.stdout == text_of(profile)


def test_check_25_the_cpu_profile_names_no_gpu() -> None:
    text = text_of("cpu").lower()
    for word in ("nvidia", "amd.com", "gpu", "cuda"):
        assert word not in text


def test_check_26_the_package_renders_as_the_folder(tmp_path: Path) -> None:
    done = run_helm("package", str(CHART), "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("*.tgz")
    for profile in ("disaggregated", "locked-down"):
        assert template(profile, chart=package).stdout == text_of(profile)


def _immutable(profile: str) -> dict[str, object]:
    """What Kubernetes does not let an upgrade change."""
    found: dict[str, object] = {}
    for item in objects(profile):
        name = f"{item['kind']}/{item['metadata']['name']}"
        if item["kind"] == "Deployment":
            found[name] = item["spec"]["selector"]
        elif item["kind"] == "PersistentVolumeClaim":
            found[name] = item["spec"]
        elif item["kind"] == "RoleBinding":
            found[name] = item["roleRef"]
    return found


@each_profile
def test_check_27_what_cannot_be_upgraded_is_as_released(profile: str) -> None:
    """immutable.json holds version 0.1.0. A change there means that users must delete objects by hand."""
    assert _immutable(profile) == json.loads(IMMUTABLE.read_text())[profile]


@each_profile
def test_the_configuration_of_the_pods_loads(profile: str) -> None:
    raw = cluster_yaml(objects(profile))
    read = config.parse(raw)
    assert read.name
    assert read.endpoints.grpc_host == read.endpoints.http_host == "0.0.0.0"
    assert read.ray.address.endswith("-head-svc:6379")


def test_large_numbers_stay_whole() -> None:
    assert cluster_yaml(objects("tp-pp"))["kvstore"]["host_bytes"] == 137438953472
    assert "e+" not in text_of("tp-pp")


def test_a_changed_number_of_workers_replaces_no_pod() -> None:
    many = parse(text_of("tp", ("cluster.pools.mixed.replicas=3", "cluster.pools.mixed.max_replicas=5")))
    for kind in ("RayService", "Deployment"):
        before, after = (
            [i for i in of_kind(items, kind) if not i["metadata"]["name"].endswith("autoscaler")]
            for items in (objects("tp"), many)
        )
        assert len(before) == len(after) > 0
        for old, new in zip(before, after, strict=True):
            if kind == "Deployment":
                assert old["spec"] == new["spec"]
                continue
            for key in ("headGroupSpec", "rayVersion"):
                assert old["spec"]["rayClusterConfig"][key] == new["spec"]["rayClusterConfig"][key]
            groups = [spec["spec"]["rayClusterConfig"]["workerGroupSpecs"][0] for spec in (old, new)]
            assert groups[0]["template"] == groups[1]["template"]
