"""Check 29: Events and facts of the autoscaler against a fake Kubernetes API."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.kubernetes.client import EVENTS, RAY_SERVICES
from deploy.kubernetes.events import EventLog, ObjectReference, Statement
from deploy.kubernetes.facts import ClusterFacts, Facts, NodeFact, PodFact, release_of_pod
from tests.deploy.kubernetes.contract import ray_service
from tests.deploy.kubernetes.fake_api import ADMIN, FakeKubernetes, api_of

ABOUT = ObjectReference(RAY_SERVICES, "chat")


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def fake() -> Iterator[FakeKubernetes]:
    server = FakeKubernetes()
    yield server
    server.stop()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def event_log(fake: FakeKubernetes, clock: Clock, token: str = ADMIN, about: ObjectReference = ABOUT) -> EventLog:
    wall = lambda: 1_767_323_045.0 + clock.now_s  # noqa: E731
    return EventLog(api_of(fake, token), "prod", about, "switchyard-autoscaler", "chat-autoscaler-0", clock, wall)


def sent(fake: FakeKubernetes) -> list[dict[str, Any]]:
    return sorted(api_of(fake).list(EVENTS, "prod"), key=lambda item: int(item["metadata"]["resourceVersion"]))


# Events


def test_an_event_says_what_why_and_about_what(fake: FakeKubernetes, clock: Clock) -> None:
    uid = fake.add(ray_service("chat"))["metadata"]["uid"]
    log = event_log(fake, clock)
    assert log.emit("TtftIsHigh", "decode: 2 -> 3 workers, since TTFT p95 is 812 ms", "ScaleUp")
    (event,) = sent(fake)
    name = event["metadata"].pop("name")
    assert name.startswith("chat.")
    assert {key: event[key] for key in event if key != "metadata"} == {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "eventTime": "2026-01-02T03:04:05.000000Z",
        "reportingController": "switchyard-autoscaler",
        "reportingInstance": "chat-autoscaler-0",
        "regarding": {
            "apiVersion": "ray.io/v1",
            "kind": "RayService",
            "namespace": "prod",
            "name": "chat",
            "uid": uid,
        },
        "reason": "TtftIsHigh",
        "note": "decode: 2 -> 3 workers, since TTFT p95 is 812 ms",
        "action": "ScaleUp",
        "type": "Normal",
    }
    assert log.emit("PlanNotReached", "decode has 2 of 3 workers", "Wait", is_warning=True)
    assert [seen.verb for seen in fake.seen if seen.resource.startswith("rayservices")] == ["get"]
    assert sent(fake)[1]["type"] == "Warning"


def test_what_is_said_again_is_counted_and_sent_once_in_ten_minutes(fake: FakeKubernetes, clock: Clock) -> None:
    log = event_log(fake, clock)
    for clock.now_s in range(0, 600, 60):
        assert log.emit("PlanNotReached", "decode has 2 of 3 workers", "Wait")
    assert len(sent(fake)) == 1
    log.emit("PlanNotReached", "decode has 1 of 3 workers", "Wait")  # another thing
    assert len(sent(fake)) == 2
    clock.now_s = 600
    log.flush()
    event = sent(fake)[2]
    assert event["series"] == {"count": 9, "lastObservedTime": "2026-01-02T03:13:05.000000Z"}
    assert event["eventTime"] == "2026-01-02T03:05:05.000000Z"
    for clock.now_s in range(630, 1200, 60):
        assert log.emit("PlanNotReached", "decode has 2 of 3 workers", "Wait")
    log.flush()
    assert len(sent(fake)) == 3
    clock.now_s = 1200
    log.flush()
    assert sent(fake)[3]["series"]["count"] == 10
    clock.now_s = 3000
    log.flush()  # nothing was said again: the series is over
    assert len(sent(fake)) == 4
    assert log.emit("PlanNotReached", "decode has 2 of 3 workers", "Wait")
    assert len(sent(fake)) == 5


def test_what_was_said_twice_is_no_series(fake: FakeKubernetes, clock: Clock) -> None:
    log = event_log(fake, clock)
    log.emit("Reason", "note", "Action")
    log.emit("Reason", "note", "Action")
    log.close()
    assert ["series" in event for event in sent(fake)] == [False, False]


def test_a_long_note_is_cut_between_letters(fake: FakeKubernetes, clock: Clock) -> None:
    assert event_log(fake, clock).emit("Reason", "é" * 2000, "Action")
    note = sent(fake)[0]["note"]
    assert len(note.encode()) <= 1024
    assert note == "é" * 510 + "..."


@pytest.mark.parametrize("word", ["", "two words", "x" * 129, "Größe"])
def test_reasons_are_words(word: str) -> None:
    with pytest.raises(ValueError, match="not one word"):
        Statement(word, "note", "Action")


def test_a_failure_is_kept_and_logged_once(
    fake: FakeKubernetes, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    log = event_log(fake, clock)
    fake.stop()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert not log.emit("Reason", "note", "Action")
    assert log.problem.startswith("could not get rayservices.ray.io chat in namespace prod: ")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    fake.start()
    assert not log.emit("Reason", "note", "Action")  # not asked yet
    clock.now_s = 10
    assert log.emit("Reason", "note", "Action")
    assert log.problem == ""
    assert len(sent(fake)) == 1


def test_a_count_that_could_not_be_sent_is_sent_later(fake: FakeKubernetes, clock: Clock) -> None:
    log = event_log(fake, clock)
    for _ in range(4):
        assert log.emit("Reason", "note", "Action")
    fake.stop()
    clock.now_s = 600
    log.flush()
    fake.start()
    log.flush()
    assert len(sent(fake)) == 1
    clock.now_s = 660
    log.flush()
    assert sent(fake)[1]["series"]["count"] == 3


def test_a_right_that_is_missing_is_named(fake: FakeKubernetes, clock: Clock) -> None:
    fake.tokens["limited"] = "limited"
    log = event_log(fake, clock, token="limited")
    assert not log.emit("Reason", "note", "Action")
    assert log.problem.startswith("not allowed to create events.events.k8s.io chat.")


def test_without_the_object_events_are_sent_all_the_same(
    fake: FakeKubernetes, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    log = event_log(fake, clock)
    for note in "ab":
        assert log.emit("Reason", note, "Action")
    assert "uid" not in sent(fake)[0]["regarding"]
    assert len(caplog.records) == 1
    assert "404 NotFound" in caplog.text
    uid = fake.add(ray_service("chat"))["metadata"]["uid"]
    assert log.emit("Reason", "c", "Action")
    assert sent(fake)[2]["regarding"]["uid"] == uid


def test_without_the_right_to_the_object_it_is_asked_for_once(fake: FakeKubernetes, clock: Clock) -> None:
    fake.tokens["limited"] = "limited"
    fake.roles["limited"] = [{"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create"]}]
    log = event_log(fake, clock, token="limited")
    assert log.emit("Reason", "a", "Action")
    assert log.emit("Reason", "b", "Action")
    assert [seen.verb for seen in fake.seen] == ["get", "create", "create"]


def test_an_api_that_is_away_is_asked_once_for_many_events(fake: FakeKubernetes, clock: Clock) -> None:
    log = event_log(fake, clock, about=ObjectReference(RAY_SERVICES, "chat", "uid"))
    for number in range(20):
        log.emit("Reason", str(number), "Action")
        log.emit("Reason", str(number), "Action")
    clock.now_s = 600
    asked = []
    fake.intercept = lambda: asked.append(1)
    log.flush()
    log.close()
    assert len(asked) == 1
    fake.intercept = None
    clock.now_s = 660
    log.flush()
    assert len(sent(fake)) == 40


def test_series_do_not_grow_without_end(fake: FakeKubernetes, clock: Clock) -> None:
    log = event_log(fake, clock, about=ObjectReference(RAY_SERVICES, "chat", "uid"))
    log.emit("Reason", "first", "Action")
    log.emit("Reason", "first", "Action")
    for number in range(300):
        log.emit("Reason", str(number), "Action")
    assert len(log._series) <= 256
    assert [event["note"] for event in sent(fake)].count("first") == 2


# Facts

LABELS = {"app.kubernetes.io/name": "switchyard", "app.kubernetes.io/instance": "r"}


def pod(name: str, pool: str = "decode", node: str = "", **status: Any) -> dict[str, Any]:
    labels = {**LABELS, "app.kubernetes.io/component": "worker", "switchyard/pool": pool}
    spec = {"nodeName": node} if node else {}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
        "status": status,
    }


def node(name: str, gpus: str, ready: str = "True", **spec: Any) -> dict[str, Any]:
    labels = {"topology.kubernetes.io/zone": "z1", "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
        "status": {
            "allocatable": {"cpu": "64", "nvidia.com/gpu": gpus},
            "conditions": [{"type": "Ready", "status": ready}],
        },
    }


UNSCHEDULABLE = {
    "type": "PodScheduled",
    "status": "False",
    "reason": "Unschedulable",
    "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
}
READY = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}]


@pytest.fixture
def cluster(fake: FakeKubernetes) -> FakeKubernetes:
    """A pool of which one pod runs, and the others show what may be wrong."""
    killed = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
    pull = {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling\nimage "x"'}}
    starting = {"waiting": {"reason": "PodInitializing"}}
    for item in (
        pod("d-0", node="n1", phase="Running", conditions=READY, containerStatuses=[{"restartCount": 0}]),
        pod("d-1", phase="Pending", conditions=[UNSCHEDULABLE]),
        pod("d-2", phase="Pending", conditions=[UNSCHEDULABLE]),
        pod("d-3", node="n1", phase="Pending", containerStatuses=[{"state": starting}, {"state": pull}]),
        pod("d-4", node="n1", phase="Running", containerStatuses=[{"restartCount": 3, "lastState": killed}]),
        pod("p-0", pool="prefill", phase="Failed", reason="Evicted", message="The node was low on memory."),
        pod("p-1", pool="prefill", phase="Pending", containerStatuses=[{"state": starting}]),
        pod("m-0", pool="mixed", node="n1", phase="Running", conditions=READY),
    ):
        fake.add(item)
    other = pod("other", phase="Pending")
    other["metadata"]["labels"]["app.kubernetes.io/instance"] = "another-release"
    fake.add(other)
    fake.add(node("n1", "8"))
    fake.add(node("n2", "4", ready="False", unschedulable=True))
    return fake


def test_pods_say_why_they_do_not_run(cluster: FakeKubernetes) -> None:
    facts = ClusterFacts(api_of(cluster), "prod", "r").read()
    assert facts is not None
    assert [found.name for found in facts.of_pool("decode")] == ["d-0", "d-1", "d-2", "d-3", "d-4"]
    by_name = {found.name: found for found in facts.pods}
    assert "other" not in by_name
    assert by_name["d-0"] == PodFact("d-0", "worker", "decode", "Running", "n1", True, False, "", 0, 0)
    assert by_name["d-1"].reason == "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    assert by_name["d-3"].reason == 'ImagePullBackOff: Back-off pulling image "x"'
    assert (by_name["d-4"].num_oom_killed, by_name["d-4"].num_restarts) == (1, 3)
    assert by_name["p-0"].reason == "Evicted: The node was low on memory."
    assert by_name["p-1"].reason == ""
    assert facts.num_oom_killed == 1
    assert facts.explain("decode") == (
        "4 of 5 pods of decode are not ready; 2 x Unschedulable: 0/3 nodes are available: 3 Insufficient "
        'nvidia.com/gpu.; ImagePullBackOff: Back-off pulling image "x"; Running, starting; '
        "1 containers were ended for lack of memory"
    )
    assert facts.explain("mixed") == facts.explain("mixed", num_wanted=1) == ""
    assert facts.explain("mixed", num_wanted=2) == "1 of 2 pods of mixed have been made"
    assert facts.explain("none") == "no pod of none has been made: see the RayCluster and the Ray operator"


def test_nodes_are_told_where_that_is_allowed(cluster: FakeKubernetes) -> None:
    facts = ClusterFacts(api_of(cluster), "prod", "r").read()
    assert facts is not None
    assert facts.nodes == (
        NodeFact("n1", 8, "NVIDIA-H100-80GB-HBM3", "z1", is_ready=True, is_schedulable=True),
        NodeFact("n2", 4, "NVIDIA-H100-80GB-HBM3", "z1", is_ready=False, is_schedulable=False),
    )


def test_nodes_that_are_not_allowed_are_no_failure(cluster: FakeKubernetes, clock: Clock) -> None:
    cluster.tokens["limited"] = "limited"
    cluster.roles["limited"] = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]
    reader = ClusterFacts(api_of(cluster, "limited"), "prod", "r", clock=clock)
    for clock.now_s in (0, 300, 599, 600):
        facts = reader.read()
        assert facts is not None
        assert facts.nodes is None
        assert facts.nodes_problem.startswith("not allowed to list nodes: ")
    assert reader.problem == ""
    assert [seen.resource for seen in cluster.seen].count("nodes") == 2


def test_pods_that_cannot_be_read_are_told(cluster: FakeKubernetes) -> None:
    cluster.tokens["limited"] = "limited"
    reader = ClusterFacts(api_of(cluster, "limited"), "prod", "r")
    assert reader.read() is None
    assert reader.problem.startswith("not allowed to list pods in namespace prod: ")
    cluster.stop()
    assert reader.read() is None
    assert reader.problem.startswith("could not list pods in namespace prod: ")
    cluster.start()
    cluster.roles["limited"] = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]
    assert isinstance(reader.read(), Facts)
    assert reader.problem == ""


def test_a_pod_knows_its_release(cluster: FakeKubernetes) -> None:
    assert release_of_pod(api_of(cluster), "prod", "d-0") == "r"
    assert release_of_pod(api_of(cluster), "prod", "none") == ""
