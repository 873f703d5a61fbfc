"""The two Valkey servers for a first install: valid, restricted, and each with the policy that its use needs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import yaml

from deploy.config import ROOT
from tests.helm.rendering import Manifest, objects, ray_service
from tests.helm.schemas import core_problems


@functools.cache
def valkey() -> tuple[Manifest, ...]:
    return tuple(yaml.safe_load_all((ROOT / "deploy" / "redis" / "valkey.yaml").read_text()))


def containers() -> dict[str, dict[str, Any]]:
    workloads = [item for item in valkey() if item["kind"] in ("StatefulSet", "Deployment")]
    return {item["metadata"]["name"]: item["spec"]["template"]["spec"]["containers"][0] for item in workloads}


def test_kubernetes_knows_every_field() -> None:
    assert [problem for item in valkey() for problem in core_problems(item, "1.34")] == []


@pytest.mark.parametrize(("name", "policy"), [("valkey-control", "noeviction"), ("valkey-tier", "allkeys-lru")])
def test_only_the_tier_evicts(name: str, policy: str) -> None:
    arguments = containers()[name]["args"]
    assert arguments[arguments.index("--maxmemory-policy") + 1] == policy
    security = containers()[name]["securityContext"]
    assert (security["allowPrivilegeEscalation"], security["capabilities"]) == (False, {"drop": ["ALL"]})


def test_the_examples_name_its_services() -> None:
    services = {item["metadata"]["name"] for item in valkey() if item["kind"] == "Service"}
    address = ray_service(objects("disaggregated"))["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert address["redisAddress"].split("//")[1].split(":")[0] in services
