"""Check 30: the chart and the autoscaler's client against a real kube-apiserver, which is built at the first run.

Version 1.20, so objects are converted down (down_convert.py). Nothing runs pods here, and nothing collects garbage.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from deploy.kubernetes.client import EVENTS, LEASES, RAY_SERVICES, KubernetesApi, in_cluster
from deploy.kubernetes.events import EventLog, ObjectReference
from deploy.kubernetes.facts import ClusterFacts, release_of_pod
from deploy.kubernetes.lease import LeaseHolder
from tests.deploy.kubernetes import contract
from tests.helm.api_server import ADMIN, LIMITED, ApiServer, Json
from tests.helm.api_server_build import CannotBuild, binaries
from tests.helm.down_convert import down_converted
from tests.helm.rendering import CHART, PROFILES, objects, of_kind, pods
from tests.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4000)]
RBAC = "rbac.authorization.k8s.io"
RELEASE = "r"
PODS_PATH = "/api/v1/namespaces/prod/pods"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    try:
        programs = binaries()
    except CannotBuild as reason:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing(f"NO REAL API SERVER, check 30 has not run: {reason}")
    started = ApiServer(programs, tmp_path_factory.mktemp("kubernetes"))
    for namespace in ("prod", "life", contract.NAMESPACE):
        must(started.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}))
    yield started
    started.stop()


def must(answer: Any) -> Json:
    assert answer.status in (200, 201), answer.message
    return dict(answer.body)


def test_it_is_the_version_that_was_built(server: ApiServer) -> None:
    about = must(server.ask("GET", "/version"))
    print(f"kube-apiserver {about['gitVersion']}, {about['goVersion']}")
    assert about["gitVersion"] == "v1.20.2"


# The chart


@pytest.mark.parametrize("profile", PROFILES)
def test_every_object_of_a_profile_is_accepted(server: ApiServer, profile: str) -> None:
    checked = []
    for item in objects(profile):
        answer = server.create(down_converted(item), dry_run=True)
        assert answer.status == 201, f"{item['kind']} {item['metadata']['name']}: {answer.message}"
        checked.append(item["kind"])
    print(f"{profile}: {len(checked)} objects accepted")
    assert len(checked) > 10


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("Service", lambda item: item["metadata"].update(name="Upper_Case")),
        ("Service", lambda item: item["spec"]["ports"][0].update(port=99999)),
        ("Deployment", lambda item: item["spec"]["selector"]["matchLabels"].update(other="label")),
        ("RayService", lambda item: item["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].update(minReplicas="two")),
    ],
)
def test_wrong_objects_are_refused(server: ApiServer, kind: str, spoil: Callable[[Json], None]) -> None:
    item = json.loads(json.dumps(down_converted(of_kind(objects("disaggregated"), kind)[0])))
    spoil(item)
    assert server.create(item, dry_run=True).status == 422


def test_pods_of_every_profile_are_accepted(server: ApiServer) -> None:
    """Those inside of a RayService too, which the server does not look into."""
    for profile in PROFILES:
        for number, pod in enumerate(pods(objects(profile))):
            item = down_converted(pod.lifted())
            item["metadata"]["name"] = f"pod-{number}"
            item["spec"].pop("priorityClassName", None)  # there is none of that name here
            answer = server.create(item, dry_run=True)
            assert answer.status == 201, f"{profile} {pod.owner}: {answer.message}"


def test_install_upgrade_rollback_uninstall(server: ApiServer) -> None:
    values = ["-n", "life", "-f", str(CHART / "ci" / "disaggregated-values.yaml")]
    converted = [*values, "--post-renderer", str(server.post_renderer())]

    def helm(*arguments: str) -> None:
        done = server.helm(*arguments)
        assert done.returncode == 0, done.stderr
        print(f"helm {arguments[0]}: done")

    def budget() -> int:
        path = "/apis/policy/v1beta1/namespaces/life/poddisruptionbudgets"
        found = must(server.ask("GET", path))["items"]
        (decode,) = [item for item in found if item["metadata"]["name"].endswith("decode")]
        return int(decode["spec"]["minAvailable"])

    def max_of(group: str) -> int:
        spec = must(server.ask("GET", "/apis/ray.io/v1/namespaces/life/rayservices"))["items"][0]["spec"]
        (found,) = [g for g in spec["rayClusterConfig"]["workerGroupSpecs"] if g["groupName"] == group]
        return int(found["maxReplicas"])

    helm("install", RELEASE, str(server.chart()), *converted)
    made = _names(server, "life")
    assert len(made) >= 20
    assert max_of("decode") == 4
    before = budget()
    more = ["--set", "cluster.pools.decode.max_replicas=6", "--set", "cluster.pools.decode.min_replicas=3"]
    helm("upgrade", RELEASE, str(server.chart()), *converted, *more, "--set", "cluster.pools.decode.replicas=3")
    assert max_of("decode") == 6
    assert budget() == before + 1
    assert _names(server, "life") == made
    helm("rollback", RELEASE, "1", "-n", "life")
    assert max_of("decode") == 4
    assert budget() == before
    helm("uninstall", RELEASE, "-n", "life")
    # The models stay by the chart's own wish.
    assert {kind for kind, _ in _names(server, "life")} == {"PersistentVolumeClaim"}


def _names(server: ApiServer, namespace: str) -> set[tuple[str, str]]:
    found = set()
    for item in objects("disaggregated"):
        path = server.path_of({**down_converted(item), "metadata": {"namespace": namespace}})
        for kept in must(server.ask("GET", path))["items"]:
            if "helm.sh/chart" in kept["metadata"].get("labels", {}):
                found.add((item["kind"], kept["metadata"]["name"]))
    return found


# The autoscaler


@pytest.fixture(scope="module")
def installed(server: ApiServer) -> Json:
    """The objects that the autoscaler needs, and its pod's template."""
    wanted = ("ServiceAccount", "Role", "RoleBinding", "RayService")
    for item in of_kind(objects("disaggregated"), *wanted):
        must(server.create(down_converted(item)))
    (pod,) = [pod for pod in pods(objects("disaggregated")) if pod.component == "autoscaler"]
    item = {**down_converted(pod.lifted()), "metadata": {**pod.metadata, "name": "autoscaler-0", "namespace": "prod"}}
    must(server.create(item))
    return item


@pytest.fixture(scope="module")
def autoscaler(
    server: ApiServer, installed: Json, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], KubernetesApi]:
    """Makes the client as in the pod: with a token of its ServiceAccount and the server's certificate."""
    credentials = tmp_path_factory.mktemp("account")
    account = installed["spec"]["serviceAccountName"]
    (credentials / "token").write_text(server.token_of("prod", account))
    (credentials / "ca.crt").write_bytes(server.certificate.read_bytes())

    def connect() -> KubernetesApi:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
            patch.setenv("KUBERNETES_SERVICE_PORT", server.url.rpartition(":")[2])
            return in_cluster(credentials)

    token = (credentials / "token").read_text()
    wait_until(lambda: server.ask("GET", PODS_PATH, token=token).status == 200, "the Role")
    return connect


def lease_name(installed: Json) -> str:
    command = installed["spec"]["containers"][0]["command"]
    return str(command[command.index("--lease") + 1])


def service_name() -> str:
    (service,) = of_kind(objects("disaggregated"), "RayService")
    return str(service["metadata"]["name"])


def test_its_rights_are_these_and_no_others(server: ApiServer, installed: Json) -> None:
    account = f"system:serviceaccount:prod:{installed['spec']['serviceAccountName']}"
    lease, service = lease_name(installed), service_name()

    def can(verb: str, group: str, resource: str, name: str = "", namespace: str = "prod") -> bool:
        attributes = {"verb": verb, "group": group, "resource": resource, "name": name, "namespace": namespace}
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "metadata": {},
            "spec": {"user": account, "resourceAttributes": attributes},
        }
        answer = must(server.ask("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review))
        return bool(answer["status"]["allowed"])

    leases, ray = ("coordination.k8s.io", "leases"), ("ray.io", "rayservices")
    allowed = [
        ("create", *leases, ""),
        ("get", *leases, lease),
        ("update", *leases, lease),
        ("create", "events.k8s.io", "events", ""),
        ("get", *ray, service),
        ("list", "", "pods", ""),
    ]
    assert all(can(*asked) for asked in allowed)
    verbs = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
    asked = [
        (verb, group, resource, name)
        for verb in verbs
        for group, resource in (
            leases,
            ray,
            ("ray.io", "rayclusters"),
            ("events.k8s.io", "events"),
            ("", "pods"),
            ("", "secrets"),
            ("", "nodes"),
            ("apps", "deployments"),
            (RBAC, "roles"),
        )
        for name in (lease, service, "other", "")
    ]
    granted = {question for question in asked if can(*question)}
    # A right without a name holds for every name.
    named = {(verb, group, resource) for verb, group, resource, name in allowed if not name}
    assert {q for q in granted if q[:3] not in named} == {q for q in allowed if q[3]}
    assert not any(can(*question[:3], namespace="life") for question in allowed)


def test_the_lease_is_held_by_one(autoscaler: Callable[[], KubernetesApi], installed: Json) -> None:
    now_s = [0.0]
    first, second = (
        LeaseHolder(autoscaler(), "prod", lease_name(installed), identity, clock=lambda: now_s[0])
        for identity in ("one", "two")
    )
    assert first.hold(), first.problem
    assert first.hold(), first.problem
    assert not second.hold()
    assert (second.problem, second.is_held) == ("", False)
    assert second.record is not None
    assert second.record.holder == "one"
    now_s[0] = 14.9
    assert not second.hold()
    assert not first.is_held
    now_s[0] = 15.0
    assert second.hold(), second.problem
    assert not first.hold()
    kept = autoscaler().get(LEASES, "prod", lease_name(installed))["spec"]
    assert (kept["holderIdentity"], kept["leaseTransitions"]) == ("two", 1)
    second.release()
    assert second.problem == ""
    assert first.hold(), first.problem
    print(f"Lease {lease_name(installed)}: one -> two -> released -> one")


def test_of_many_that_race_one_wins(autoscaler: Callable[[], KubernetesApi], installed: Json) -> None:
    now_s = [0.0]
    contenders = [
        LeaseHolder(autoscaler(), "prod", lease_name(installed), f"racer-{number}", clock=lambda: now_s[0])
        for number in range(6)
    ]
    for contender in contenders:
        contender.hold()  # all have seen the record: fifteen seconds later whoever is first takes it
    for _ in range(10):
        now_s[0] += 15
        with ThreadPoolExecutor(len(contenders)) as threads:
            took = list(threads.map(LeaseHolder.hold, contenders))
        assert sum(took) == sum(contender.is_held for contender in contenders) == 1


def test_a_lease_of_another_name_is_not_its_own(autoscaler: Callable[[], KubernetesApi]) -> None:
    holder = LeaseHolder(autoscaler(), "prod", "another", "one")
    assert not holder.hold()
    assert holder.problem.startswith("not allowed to get leases.coordination.k8s.io another in namespace prod: ")


def test_events_are_kept_under_the_rayservice(server: ApiServer, autoscaler: Callable[[], KubernetesApi]) -> None:
    now_s = [0.0]
    about = ObjectReference(RAY_SERVICES, service_name())
    log = EventLog(autoscaler(), "prod", about, "switchyard-autoscaler", "autoscaler-0", clock=lambda: now_s[0])
    assert log.emit("TtftIsHigh", "é" * 2000, "ScaleUp"), log.problem
    for _ in range(3):
        assert log.emit("PlanNotReached", "decode has 2 of 3 workers", "Wait", is_warning=True), log.problem
    now_s[0] = 600
    log.flush()
    assert log.problem == ""
    kept = must(server.ask("GET", EVENTS.path("prod")))["items"]
    counts = [(item["type"], (item.get("series") or {}).get("count")) for item in kept if item["action"] == "Wait"]
    assert sorted(counts, key=str) == [("Warning", 2), ("Warning", None)]
    uid = must(server.ask("GET", RAY_SERVICES.path("prod", service_name())))["metadata"]["uid"]
    # What `kubectl describe rayservice` asks for.
    described = f"/api/v1/namespaces/prod/events?fieldSelector=involvedObject.uid%3D{uid}"
    shown = must(server.ask("GET", described))["items"]
    assert len(shown) == len(kept) == 3
    print("events:", [(item["reason"], item["type"], item.get("series")) for item in shown])


def test_facts_are_read_without_the_right_to_nodes(
    server: ApiServer, installed: Json, autoscaler: Callable[[], KubernetesApi]
) -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/0 nodes"}
    status = {"status": {"phase": "Pending", "conditions": [condition]}}
    path = f"{PODS_PATH}/autoscaler-0"
    item = must(server.ask("GET", path))
    must(server.ask("PUT", f"{path}/status", {**item, **status}))
    facts = ClusterFacts(autoscaler(), "prod", RELEASE).read()
    assert facts is not None
    assert [(pod.name, pod.component, pod.reason) for pod in facts.pods] == [
        ("autoscaler-0", "autoscaler", "Unschedulable: 0/0 nodes")
    ]
    assert facts.nodes is None
    assert facts.nodes_problem.startswith("not allowed to list nodes: ")
    assert release_of_pod(autoscaler(), "prod", "autoscaler-0") == RELEASE
    print("facts:", facts)


# The fake


def test_the_contract_of_the_fake_was_recorded_here(server: ApiServer) -> None:
    role = {"apiVersion": f"{RBAC}/v1", "metadata": {"name": "limited", "namespace": contract.NAMESPACE}}
    must(server.create({**role, "kind": "Role", "rules": list(contract.LIMITED_RULES)}))
    reference = {"apiGroup": RBAC, "kind": "Role", "name": "limited"}
    subject = {"apiGroup": RBAC, "kind": "User", "name": "limited"}
    must(server.create({**role, "kind": "RoleBinding", "roleRef": reference, "subjects": [subject]}))
    pods_path = f"/api/v1/namespaces/{contract.NAMESPACE}/pods"
    wait_until(lambda: server.ask("GET", pods_path, token=LIMITED).status == 200, "the Role")
    answers = contract.replay(server.url, server.pool, {"admin": ADMIN, "limited": LIMITED})
    assert answers == contract.recorded()
    print(f"contract: {len(answers)} requests answered alike")


def test_watches_are_as_those_of_the_fake(server: ApiServer) -> None:
    maps = f"/api/v1/namespaces/{contract.NAMESPACE}/configmaps"
    version = must(server.ask("GET", maps))["metadata"]["resourceVersion"]
    must(server.ask("POST", maps, contract.config_map("one")))
    assert contract.outline(contract.watched(server.url, server.pool, ADMIN, version)) == contract.WATCHED
    # Events are not cached by the server, so their history is etcd's.
    events = EVENTS.path(contract.NAMESPACE)
    must(server.ask("POST", events, contract.event("w1")))
    version = must(server.ask("GET", events))["metadata"]["resourceVersion"]
    for name in ("w2", "w3"):
        latest = must(server.ask("POST", events, contract.event(name)))["metadata"]["resourceVersion"]
    server.compact(int(latest))
    (gone,) = contract.watched(server.url, server.pool, ADMIN, version, "events")
    assert (gone["type"], gone["object"]["code"], gone["object"]["reason"]) == ("ERROR", 410, "Expired")


def test_a_rotated_token_is_accepted(server: ApiServer, installed: Json) -> None:
    """Two tokens of one ServiceAccount are valid at a time, so a rotation interrupts nothing."""
    account = installed["spec"]["serviceAccountName"]
    first = server.token_of("prod", account)
    time.sleep(1.1)  # tokens differ by the second in which they were made
    second = server.token_of("prod", account)
    assert first != second
    assert [server.ask("GET", PODS_PATH, token=token).status for token in (first, second)] == [200, 200]
