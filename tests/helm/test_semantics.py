"""Checks 8, 9, 11-15, 18 and 19 of the chart: what no schema knows."""

from __future__ import annotations

import re
from typing import Any

import pytest

from deploy import config, plan
from tests.helm.rendering import (
    PROFILES,
    Manifest,
    cluster_yaml,
    gib,
    objects,
    of_kind,
    parse,
    pods,
    ray_service,
    template,
)
from tests.helm.schemas import custom_definitions

each_profile = pytest.mark.parametrize("profile", PROFILES)
LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
GPU = "nvidia.com/gpu"


@each_profile
def test_check_8_every_container_says_what_it_needs(profile: str) -> None:
    wanted = cluster_yaml(objects(profile))["pools"]
    for pod in pods(objects(profile)):
        for container in pod.containers:
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]), container["name"]
            assert "memory" in resources["limits"]
        resources = pod.main["resources"]
        pool = wanted.get(pod.metadata["labels"].get("switchyard/pool"), {})
        gpus = str(pool.get("tp", 1)) if pool.get("device") == "cuda" else None
        assert resources["requests"].get(GPU) == resources["limits"].get(GPU) == gpus
        if pod.component in ("head", "worker"):
            (shm,) = [volume["emptyDir"] for volume in pod.spec["volumes"] if volume["name"] == "dshm"]
            assert shm["medium"] == "Memory"
            assert gib(shm["sizeLimit"]) < gib(resources["limits"]["memory"])


@each_profile
def test_check_8_the_kv_arena_fits_into_shared_memory(profile: str) -> None:
    host_bytes = cluster_yaml(objects(profile))["kvstore"]["host_bytes"]
    for pod in pods(objects(profile)):
        if pod.component == "worker":
            (shm,) = [volume["emptyDir"] for volume in pod.spec["volumes"] if volume["name"] == "dshm"]
            assert gib(shm["sizeLimit"]) * 2**30 * 0.8 >= host_bytes


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_check_9_a_replica_of_a_group_is_one_worker(tp: int, pp: int) -> None:
    sizes = [f"cluster.pools.mixed.{key}={value}" for key, value in {"tp": tp, "pp": pp, "max_replicas": 3}.items()]
    done = template("tp", sizes)
    assert done.returncode == 0, done.stderr
    items = parse(done.stdout)
    (pod,) = [pod for pod in pods(items) if pod.component == "worker"]
    assert pod.group is not None
    raw = cluster_yaml(items)["pools"]["mixed"]
    pool = config.parse({"pools": {"mixed": raw}}).pools["mixed"]
    bundles = plan.bundles(pool, on_gpu=True)
    per_pod = int(pod.main["resources"]["limits"][GPU])
    hosts = pod.group["numOfHosts"]
    assert sum(bundle.get("GPU", 0) for bundle in bundles) == tp * pp == per_pod * hosts
    # Bundles fit into the pods: the first, the replica's own, beside a stage.
    offered = int(pod.group["rayStartParams"]["num-cpus"])
    assert len(bundles) == 1 + pp
    for stage in bundles[1:]:
        assert bundles[0]["CPU"] + stage["CPU"] <= offered <= int(pod.main["resources"]["requests"]["cpu"])
        assert stage["GPU"] == per_pod
    # Every bundle asks for the pool's own resource, which no other pod offers.
    (tie,) = pool.resources
    assert pod.group["rayStartParams"]["resources"] == f'"{{\\"{tie}\\": 1000}}"'
    assert pool.max_replicas * pp <= pod.group["maxReplicas"] * hosts


@each_profile
def test_check_9_groups_scale_as_far_as_their_pools(profile: str) -> None:
    pools = cluster_yaml(objects(profile))["pools"]
    groups = {pod.group["groupName"]: pod.group for pod in pods(objects(profile)) if pod.group}
    assert groups.keys() == pools.keys()
    for name, pool in pools.items():
        replicas = pool.get("replicas", 1)
        assert groups[name]["minReplicas"] == pool.get("min_replicas", replicas)
        assert groups[name]["maxReplicas"] == pool.get("max_replicas", replicas)
        assert groups[name]["numOfHosts"] == pool.get("pp", 1)


def test_check_9_with_an_autoscaler_that_acts_the_chart_names_no_number() -> None:
    service = ray_service(objects("tp"))
    assert cluster_yaml(objects("tp"))["autoscaling"] == {"mode": "act"}
    assert "replicas" not in service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert "num_replicas" not in service["spec"]["serveConfigV2"]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("release", ["r", "x" * 53])
def test_check_11_kuberay_takes_the_service(profile: str, release: str) -> None:
    items = objects(profile, release=release)
    service = ray_service(items)
    spec, cluster = service["spec"], service["spec"]["rayClusterConfig"]
    name = service["metadata"]["name"]
    assert len(name) <= 47
    assert len(f"{name}-xxxxx") <= 53
    assert LABEL.fullmatch(name)
    assert "upgradeStrategy" not in cluster
    assert not {"tlsOptions", "networkPolicy", "historyServerOptions"} & set(cluster)
    assert spec["upgradeStrategy"]["type"] in ("NewCluster", "None")
    assert cluster["autoscalerOptions"]["version"] == "v2"
    if "authOptions" in cluster:
        assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)
        assert not cluster["authOptions"].get("enableK8sTokenAuth")
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert "labels" not in group["rayStartParams"]
        assert "redis-password" not in group["rayStartParams"]
        assert "resources" not in group
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        template_spec = group["template"]["spec"]
        assert template_spec.get("restartPolicy") in (None, "Never")
        assert "ray.io/ft-enabled" not in group["template"]["metadata"].get("annotations", {})
        names = {env["name"] for container in template_spec["containers"] for env in container["env"]}
        assert not names & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"}
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group.get("replicas", group["minReplicas"]) <= group["maxReplicas"]
        assert LABEL.fullmatch(group["groupName"])
    assert spec["excludeHeadPodFromServeSvc"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_check_11_the_heads_state_is_kept_where_nothing_is_evicted() -> None:
    cluster = ray_service(objects("disaggregated"))["spec"]["rayClusterConfig"]
    wanted = {"valueFrom": {"secretKeyRef": {"name": "valkey-control", "key": "password"}}}
    assert cluster["gcsFaultToleranceOptions"] == {
        "redisAddress": "redis://valkey-control:6379",
        "redisPassword": wanted,
    }


@each_profile
def test_check_12_services_reach_exactly_their_pods(profile: str) -> None:
    made = pods(objects(profile))
    for service in of_kind(objects(profile), "Service"):
        selector = service["spec"]["selector"].items()
        chosen = [pod for pod in made if selector <= pod.metadata["labels"].items()]
        component = service["metadata"]["labels"]["app.kubernetes.io/component"]
        assert [pod.component for pod in chosen] == [component]
        named = {port["name"] for port in chosen[0].main["ports"]}
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in named
            is_grpc = port["name"] == "grpc"
            assert port["appProtocol"] == ("kubernetes.io/h2c" if is_grpc else "http")


@each_profile
def test_check_12_ports_of_the_head(profile: str) -> None:
    """There is no `serve-grpc`: gRPC goes to the routers, and Serve's own gRPC proxy is off."""
    (head,) = [pod for pod in pods(objects(profile)) if pod.component == "head"]
    named = {port["name"]: port["containerPort"] for port in head.main["ports"]}
    assert named == {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080, "serve": 8000}


@pytest.mark.parametrize("release", ["r", "7", "x" * 53, f"{'very-' * 10}9"])
@pytest.mark.parametrize("model", ["Org/Llama-3.2-1B", "meta-llama/Llama-3.1-405B-Instruct"])
def test_check_13_names_are_valid(release: str, model: str) -> None:
    done = template("disaggregated", [f"cluster.model.path={model}"], release=release)
    assert done.returncode == 0, done.stderr
    items = parse(done.stdout)
    for item in items:
        assert LABEL.fullmatch(item["metadata"]["name"]), item["metadata"]["name"]
        for value in item["metadata"]["labels"].values():
            assert isinstance(value, str)
            assert len(value) <= 63
    for pod in pods(items):
        for container in pod.containers:
            assert LABEL.fullmatch(container["name"])
            assert all(len(port["name"]) <= 15 for port in container.get("ports", []))
    for service in of_kind(items, "Service"):
        assert all(len(port["name"]) <= 15 for port in service["spec"]["ports"])


def test_check_13_long_releases_do_not_share_names() -> None:
    names = {ray_service(objects("cpu", release="x" * 52 + end))["metadata"]["name"] for end in "ab"}
    assert len(names) == 2


@each_profile
def test_check_14_only_what_scales_is_scaled(profile: str) -> None:
    for item in of_kind(objects(profile), "HorizontalPodAutoscaler", "ScaledObject"):
        target = item["spec"]["scaleTargetRef"]
        assert (target["apiVersion"], target["kind"]) == ("apps/v1", "Deployment")
        (deployment,) = [d for d in of_kind(objects(profile), "Deployment") if d["metadata"]["name"] == target["name"]]
        assert "replicas" not in deployment["spec"]


def test_check_14_kuberays_objects_cannot_be_scaled() -> None:
    for kind in ("RayService", "RayCluster"):
        assert "scale" not in custom_definitions()["ray.io/v1", kind]["subresources"]


@each_profile
def test_check_15_a_pod_lives_longer_than_its_streams(profile: str) -> None:
    raw = cluster_yaml(objects(profile))
    longest = raw["router"]["request_timeout_s"]
    for pod in pods(objects(profile)):
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        if pod.component == "router":
            slept = float(pod.main["lifecycle"]["preStop"]["exec"]["command"][-1])
            assert grace > slept + raw["router"]["drain_s"] + 5
            assert raw["router"]["drain_s"] >= longest
        if pod.component == "worker":
            drain = raw["pools"][pod.metadata["labels"]["switchyard/pool"]]["drain_timeout_s"]
            assert grace > float(pod.main["lifecycle"]["preStop"]["exec"]["command"][-1]) + 5
            assert pod.main["lifecycle"]["preStop"]["exec"]["command"][-1] == str(int(drain))
            assert drain >= longest


def test_check_15_startup_probes_wait_for_the_model() -> None:
    for pod in pods(objects("tp-pp")):
        if pod.component == "worker":
            probe = pod.main["startupProbe"]
            assert probe["periodSeconds"] * probe["failureThreshold"] >= 3600
    annotations = ray_service(objects("tp-pp"))["metadata"]["annotations"]
    assert int(annotations["ray.io/initializing-timeout"].removesuffix("s")) > 3600


def _allows(policy: Manifest, pod: Any, port: dict[str, Any], peer: dict[str, str]) -> bool:
    """Whether a policy lets pods with the peer's labels reach a container port."""
    for rule in policy["spec"].get("ingress", []):
        ports = rule.get("ports")
        if ports and not any(wanted["port"] in (port["name"], port["containerPort"]) for wanted in ports):
            continue
        if "from" not in rule or any(_matches(who, peer) for who in rule["from"]):
            return True
    return False


def _matches(who: dict[str, Any], peer: dict[str, str]) -> bool:
    selector = who.get("podSelector") or who.get("namespaceSelector") or {}
    exact = selector.get("matchLabels", {}).items() <= peer.items()
    return exact and all(peer.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", []))


def _policy_of(items: tuple[Manifest, ...], labels: dict[str, str]) -> list[Manifest]:
    policies = of_kind(items, "NetworkPolicy")
    return [policy for policy in policies if _matches({"podSelector": policy["spec"]["podSelector"]}, labels)]


def test_check_18_every_component_has_a_policy_with_dns() -> None:
    items = objects("locked-down")
    for pod in pods(items):
        policies = _policy_of(items, pod.metadata["labels"])
        assert policies, pod.component
        ports = [port for policy in policies for rule in policy["spec"]["egress"] for port in rule.get("ports", [])]
        assert {"port": 53, "protocol": "UDP"} in ports


@pytest.mark.parametrize(
    ("component", "port", "peer", "allowed"),
    [
        ("router", "grpc", {"kubernetes.io/metadata.name": "gateways"}, True),
        ("router", "grpc", {"kubernetes.io/metadata.name": "other"}, False),
        ("router", "http", {"kubernetes.io/metadata.name": "monitoring"}, True),
        ("router", "grpc", {"component": "test"}, True),
        ("head", "dashboard", {"component": "autoscaler"}, True),
        ("head", "dashboard", {"kubernetes.io/metadata.name": "kuberay"}, True),
        ("head", "dashboard", {"component": "test"}, False),
        ("head", "gcs-server", {"component": "worker"}, True),
        ("head", "gcs-server", {"kubernetes.io/metadata.name": "kuberay"}, False),
        ("head", "metrics", {"kubernetes.io/metadata.name": "monitoring"}, True),
        ("worker", "metrics", {"kubernetes.io/metadata.name": "monitoring"}, True),
        ("worker", "serve", {"component": "router"}, True),
        ("worker", "serve", {"kubernetes.io/metadata.name": "gateways"}, False),
        ("autoscaler", "metrics", {"kubernetes.io/metadata.name": "monitoring"}, True),
        ("autoscaler", "metrics", {"component": "worker"}, False),
    ],
)
def test_check_18_who_may_reach_what(component: str, port: str, peer: dict[str, str], allowed: bool) -> None:
    items = objects("locked-down")
    pod = next(pod for pod in pods(items) if pod.component == component)
    (declared,) = [item for item in pod.main["ports"] if item["name"] == port]
    if "component" in peer:
        labels = next(p for p in pods(items) if p.component == peer["component"]).metadata["labels"]
    else:
        labels = peer
    policies = _policy_of(items, pod.metadata["labels"])
    assert any(_allows(policy, pod, declared, labels) for policy in policies) is allowed


def test_check_18_only_the_head_and_the_autoscaler_reach_the_api_server() -> None:
    items = objects("locked-down")
    for pod in pods(items):
        rules = [r for policy in _policy_of(items, pod.metadata["labels"]) for r in policy["spec"]["egress"]]
        reaches = any(port["port"] == 6443 for rule in rules for port in rule.get("ports", []))
        assert reaches is (pod.component in ("head", "autoscaler")), pod.component


@each_profile
def test_check_19_budgets_protect_and_never_block(profile: str) -> None:
    """A pool's budget has a number: the disruption controller cannot count replicas of a RayCluster."""
    items = objects(profile)
    budgets = of_kind(items, "PodDisruptionBudget")
    for pod in pods(items):
        labels = pod.metadata["labels"].items()
        mine = [b["spec"] for b in budgets if b["spec"]["selector"]["matchLabels"].items() <= labels]
        assert len(mine) == (pod.component in ("router", "autoscaler", "worker")), pod.component
        if pod.group is not None:
            assert set(mine[0]) == {"minAvailable", "selector"}
            num_pods = pod.group["minReplicas"] * pod.group["numOfHosts"]
            assert 0 <= mine[0]["minAvailable"] <= num_pods - pod.group["numOfHosts"]
        elif mine:
            assert mine[0]["maxUnavailable"] == 1
