"""Check 29: the Lease against a fake Kubernetes API, and the fake against its contract."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import urllib3

from deploy.kubernetes.client import (
    LEASES,
)
from deploy.kubernetes.lease import LeaseHolder
from tests.deploy.kubernetes import contract
from tests.deploy.kubernetes.fake_api import ADMIN, FakeKubernetes, api_of

NAME = "chat-autoscaler"


class Clock:
    """One host's monotonic clock."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def fake() -> Iterator[FakeKubernetes]:
    server = FakeKubernetes()
    yield server
    server.stop()


def holder(fake: FakeKubernetes, identity: str, clock: Clock, token: str = ADMIN) -> LeaseHolder:
    return LeaseHolder(api_of(fake, token), "prod", NAME, identity, duration_s=15, clock=clock)


def spec_of(fake: FakeKubernetes) -> dict[str, Any]:
    return dict(api_of(fake).get(LEASES, "prod", NAME)["spec"])


def rights(*verbs: str) -> list[dict[str, Any]]:
    return [{"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": list(verbs)}]


# The fake itself


def test_the_fake_answers_as_recorded_from_a_real_server(fake: FakeKubernetes) -> None:
    fake.tokens["limited"] = "limited"
    fake.roles["limited"] = contract.LIMITED_RULES
    tokens = {"admin": ADMIN, "limited": "limited"}
    assert contract.replay(fake.url, urllib3.PoolManager(), tokens) == contract.recorded()


def test_the_fake_watches_with_bookmarks_and_says_what_is_gone(fake: FakeKubernetes) -> None:
    version = str(fake.store.version)
    fake.add(contract.config_map("one"), contract.NAMESPACE)
    seen = contract.watched(fake.url, urllib3.PoolManager(), ADMIN, version)
    assert contract.outline(seen) == contract.WATCHED
    assert seen[-1]["type"] == "BOOKMARK"
    assert seen[-1]["object"]["metadata"]["resourceVersion"] == str(fake.store.version)
    fake.add(contract.config_map("two"), contract.NAMESPACE)
    fake.store.compact()
    (gone,) = contract.watched(fake.url, urllib3.PoolManager(), ADMIN, version)
    assert (gone["type"], gone["object"]["code"], gone["object"]["reason"]) == ("ERROR", 410, "Expired")


# The Lease


def test_a_lease_is_acquired_renewed_and_released(fake: FakeKubernetes) -> None:
    clock = Clock()
    mine = holder(fake, "a", clock)
    assert not mine.is_held
    assert mine.hold()
    assert mine.is_held
    first = spec_of(fake)
    assert first["holderIdentity"] == "a"
    assert (first["leaseDurationSeconds"], first["leaseTransitions"]) == (15, 0)
    clock.now_s = 4
    assert mine.hold()
    renewed = spec_of(fake)
    assert renewed["acquireTime"] == first["acquireTime"]
    assert renewed["renewTime"] > first["renewTime"]
    assert renewed["leaseTransitions"] == 0
    mine.release()
    assert not mine.is_held
    assert spec_of(fake)["holderIdentity"] is None
    assert mine.problem == ""


def test_a_released_lease_is_taken_at_once(fake: FakeKubernetes) -> None:
    clock = Clock()
    mine, other = holder(fake, "a", clock), holder(fake, "b", clock)
    assert mine.hold()
    assert not other.hold()
    mine.release()
    assert other.hold()
    assert spec_of(fake)["leaseTransitions"] == 1
    mine.release()  # no longer its own: nothing happens
    assert spec_of(fake)["holderIdentity"] == "b"
    assert other.is_held


def test_another_takes_over_after_the_duration_and_not_before(fake: FakeKubernetes) -> None:
    # Two hosts whose clocks have nothing in common.
    dead_clock, clock = Clock(1e6), Clock()
    dead, other = holder(fake, "a", dead_clock), holder(fake, "b", clock)
    assert dead.hold()
    clock.now_s = 100
    assert not other.hold()
    assert other.problem == ""
    assert other.record is not None
    assert other.record.holder == "a"
    clock.now_s = 114.9
    assert not other.hold()
    clock.now_s = 115.0
    assert other.hold()
    assert spec_of(fake)["leaseTransitions"] == 1
    assert not dead.hold()
    assert not dead.is_held


def test_each_renewal_that_is_seen_starts_the_duration_anew(fake: FakeKubernetes) -> None:
    clock = Clock()
    mine, other = holder(fake, "a", Clock()), holder(fake, "b", clock)
    for clock.now_s in range(0, 100, 10):
        assert mine.hold()
        assert not other.hold()


def test_a_holder_gives_up_before_another_could_take_it(fake: FakeKubernetes) -> None:
    clock = Clock()
    mine, other = holder(fake, "a", clock), holder(fake, "b", clock)
    assert mine.hold()
    assert not other.hold()
    fake.stop()
    clock.now_s = 9.9
    assert not mine.hold()
    assert "could not get leases.coordination.k8s.io chat-autoscaler in namespace prod: " in mine.problem
    assert mine.is_held
    clock.now_s = 10.0
    assert not mine.is_held
    fake.start()
    clock.now_s = 14.9
    assert not other.hold()
    assert mine.hold()  # the API is back, and nobody took it
    assert mine.problem == ""


def test_the_holders_time_counts_from_before_its_call(fake: FakeKubernetes) -> None:
    clock = Clock()
    mine = holder(fake, "a", clock)
    fake.before_write = lambda: setattr(clock, "now_s", 3.0)  # the call takes three seconds
    assert mine.hold()
    clock.now_s = 9.9
    assert mine.is_held
    clock.now_s = 10.0
    assert not mine.is_held


def test_of_two_that_race_to_create_one_wins(fake: FakeKubernetes) -> None:
    clock = Clock()
    mine, other = holder(fake, "a", clock), holder(fake, "b", clock)
    fake.before_write = lambda: _assert(other.hold())
    assert not mine.hold()
    assert not mine.is_held
    assert mine.problem == ""
    assert [seen.status for seen in fake.seen if seen.verb == "create"] == [201, 409]


def test_of_two_that_race_to_take_over_one_wins(fake: FakeKubernetes) -> None:
    clock = Clock()
    assert holder(fake, "dead", clock).hold()
    mine, other = holder(fake, "a", clock), holder(fake, "b", clock)
    assert not mine.hold()
    assert not other.hold()
    clock.now_s = 15
    fake.before_write = lambda: _assert(other.hold())
    assert not mine.hold()
    assert (mine.is_held, other.is_held) == (False, True)
    assert [seen.status for seen in fake.seen if seen.verb == "update"] == [200, 409]


def test_of_many_that_race_one_wins(fake: FakeKubernetes) -> None:
    now_s = [0.0]
    contenders = [
        LeaseHolder(api_of(fake), "prod", NAME, f"racer-{number}", clock=lambda: now_s[0]) for number in range(6)
    ]
    for contender in contenders:
        contender.hold()  # all have seen the record: fifteen seconds later whoever is first takes it
    for _ in range(20):
        now_s[0] += 15
        with ThreadPoolExecutor(len(contenders)) as threads:
            took = list(threads.map(LeaseHolder.hold, contenders))
        assert sum(took) == sum(contender.is_held for contender in contenders) == 1


def test_a_version_that_has_become_stale_is_read_again(fake: FakeKubernetes) -> None:
    clock = Clock()
    mine = holder(fake, "a", clock)
    assert mine.hold()
    admin = api_of(fake)

    def annotate() -> None:
        item = admin.get(LEASES, "prod", NAME)
        admin.replace(LEASES, "prod", {**item, "metadata": {**item["metadata"], "annotations": {"by": "hand"}}})

    fake.before_write = annotate
    assert mine.hold()
    assert mine.problem == ""
    assert admin.get(LEASES, "prod", NAME)["metadata"]["annotations"] == {"by": "hand"}


@pytest.mark.parametrize("count", [2, 5])
def test_there_is_never_more_than_one_holder(fake: FakeKubernetes, count: int) -> None:
    """Contenders with clocks of their own, some of which stop for a while; whoever is stopped does nothing."""
    clock = Clock()
    contenders = [holder(fake, f"c{number}", clock) for number in range(count)]
    winners = set()
    for step in range(300):
        clock.now_s = step * 0.7
        for number, contender in enumerate(contenders):
            is_stopped = (step // 40) % count == number
            if not is_stopped and (step + number) % 3 == 0:
                contender.hold()
        held = [contender for contender in contenders if contender.is_held]
        assert len(held) <= 1
        winners.update(map(id, held))
    assert len(winners) > 1


def test_a_holder_that_gave_up_still_releases(fake: FakeKubernetes) -> None:
    clock = Clock()
    mine, other = holder(fake, "a", clock), holder(fake, "b", clock)
    assert mine.hold()
    clock.now_s = 12
    assert not mine.is_held
    mine.release()
    assert other.hold()


@pytest.mark.parametrize(
    ("allowed", "problem"),
    [
        ((), "not allowed to get leases.coordination.k8s.io chat-autoscaler in namespace prod: "),
        (("get",), "not allowed to create leases.coordination.k8s.io chat-autoscaler in namespace prod: "),
        (("get", "create"), "not allowed to update leases.coordination.k8s.io chat-autoscaler in namespace prod: "),
    ],
)
def test_a_right_that_is_missing_is_named(fake: FakeKubernetes, allowed: tuple[str, ...], problem: str) -> None:
    fake.tokens["limited"] = "limited"
    fake.roles["limited"] = rights(*allowed)
    clock = Clock()
    mine = holder(fake, "a", clock, token="limited")
    mine.hold()
    assert not mine.hold()
    assert mine.problem.startswith(problem)
    mine.release()  # does not raise either


def test_a_lease_of_another_program_without_a_duration_is_respected(fake: FakeKubernetes) -> None:
    clock = Clock()
    fake.add(
        {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": NAME, "labels": {"own": "yes"}},
            "spec": {"holderIdentity": "x"},
        }
    )
    mine = holder(fake, "a", clock)
    assert not mine.hold()
    clock.now_s = 15
    assert mine.hold()
    assert api_of(fake).get(LEASES, "prod", NAME)["metadata"]["labels"] == {"own": "yes"}


def _assert(condition: bool) -> None:
    assert condition
