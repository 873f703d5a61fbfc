"""Workers change roles and retire under load: they drain, take the new role under a new epoch, and lose no stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from switchyard.v1 import worker_pb2 as pb
from switchyard.v1 import worker_pb2_grpc

from tests.cluster.deaths import NUM_TOKENS, check, prompt
from tests.cluster.test_leases import epochs
from tests.fake_cluster import Answer, FakeCluster
from tests.processes import DEADLINE_S, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

NUM_STREAMS = 32


@contextmanager
def worker(cluster: FakeCluster, name: str) -> Iterator[worker_pb2_grpc.WorkerServiceStub]:
    """A worker's service."""
    with grpc.insecure_channel(cluster.workers[name].ready["address"]) as channel:
        yield worker_pb2_grpc.WorkerServiceStub(channel)


def status(stub: worker_pb2_grpc.WorkerServiceStub) -> pb.WorkerStatus:
    return stub.GetLoad(pb.GetLoadRequest(), timeout=DEADLINE_S).status


def drain(stub: worker_pb2_grpc.WorkerServiceStub, timeout_s: float) -> None:
    """Until it is drained."""
    stub.Drain(pb.DrainRequest(timeout_s=timeout_s), timeout=DEADLINE_S)
    wait_until(lambda: status(stub).phase == pb.WORKER_PHASE_DRAINED, "it is drained")


@contextmanager
def under_load(cluster: FakeCluster) -> Iterator[list[Answer]]:
    """While 32 streams run at any time; each is checked token by token."""
    answers: list[Answer] = []
    is_over = False

    def go_on(number: int) -> None:
        client = cluster.client()
        while not is_over:
            number += NUM_STREAMS
            answer = cluster.ask(client, prompt(number), NUM_TOKENS)
            check(answer, number)
            answers.append(answer)

    with ThreadPoolExecutor(NUM_STREAMS) as threads:
        running = [threads.submit(go_on, number) for number in range(NUM_STREAMS)]
        try:
            wait_until(lambda: len(answers) >= NUM_STREAMS, "the streams run")
            yield answers
        finally:
            is_over = True
        for stream in running:
            stream.result()


def test_a_prefill_worker_becomes_a_decode_worker_and_back(
    fake_cluster: Callable[..., FakeCluster], measured: Callable[[str, float], None]
) -> None:
    cluster = fake_cluster(prefill=2, decode=1, routers=2, step_s=0.01)
    worker_id = cluster.workers["prefill-1"].ready["worker_id"]
    before = epochs(cluster)[worker_id]
    with under_load(cluster), worker(cluster, "prefill-1") as stub:
        for pool, role in (("decode", pb.WORKER_ROLE_DECODE), ("prefill", pb.WORKER_ROLE_PREFILL)):
            began_s = time.monotonic()
            drain(stub, 30.0)
            switched = stub.SwitchRole(pb.SwitchRoleRequest(pool=pool, role=role), timeout=DEADLINE_S)
            assert (switched.phase, switched.pool, switched.role) == (pb.WORKER_PHASE_SWITCHED, pool, role)
            assert epochs(cluster)[worker_id] == before, "it is listed as retired"
            announced = stub.Announce(pb.AnnounceRequest(), timeout=DEADLINE_S)
            assert announced.phase == pb.WORKER_PHASE_READY
            measured("a change of roles under 32 streams", time.monotonic() - began_s)
            assert epochs(cluster)[worker_id] > before
            before = epochs(cluster)[worker_id]
            for url in cluster.http_urls:
                wait_until(lambda url=url, pool=pool: roles(cluster, url).get(worker_id) == (pool, pool), "it is known")
            wait_until(lambda: status(stub).num_requests > 0, "it works in its new role")
    cluster.wait_at_rest()


def test_what_still_runs_when_a_drain_is_over_is_moved(fake_cluster: Callable[..., FakeCluster]) -> None:
    """A drain of no time at all: its streams go on elsewhere, with the same tokens, and are counted."""
    cluster = fake_cluster(prefill=1, decode=2, routers=2, step_s=0.01)
    with under_load(cluster) as answers, worker(cluster, "decode-0") as stub:
        wait_until(lambda: status(stub).num_requests > 4, "streams run there")
        num_before = len(answers)
        drain(stub, 0.0)
        assert cluster.load("decode-0").num_moved_streams > 4
        wait_until(lambda: len(answers) >= num_before + 2 * NUM_STREAMS, "the streams go on")
        assert status(stub).num_requests == 0
        stub.Announce(pb.AnnounceRequest(), timeout=DEADLINE_S)
        wait_until(lambda: status(stub).num_requests > 0, "it serves again")
    assert any(answer.finished and answer.finished.stats.num_replacements for answer in answers)
    cluster.wait_at_rest()


def test_a_worker_that_serves_takes_no_other_role(fake_cluster: Callable[..., FakeCluster]) -> None:
    cluster = fake_cluster(prefill=1, decode=1, routers=1)
    with worker(cluster, "prefill-0") as stub:
        with pytest.raises(grpc.RpcError) as refused:
            stub.SwitchRole(pb.SwitchRoleRequest(pool="decode", role=pb.WORKER_ROLE_DECODE), timeout=DEADLINE_S)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "only a drained worker changes roles" in refused.value.details()
        drain(stub, 0.0)
        for wrong in (pb.SwitchRoleRequest(pool="decode"), pb.SwitchRoleRequest(role=pb.WORKER_ROLE_DECODE)):
            with pytest.raises(grpc.RpcError) as refused:
                stub.SwitchRole(wrong, timeout=DEADLINE_S)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as refused:
            stub.Drain(pb.DrainRequest(timeout_s=-1.0), timeout=DEADLINE_S)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def roles(cluster: FakeCluster, url: str) -> dict[str, tuple[str, str]]:
    """Pool and role of each worker, as a router has them."""
    return {w["worker_id"]: (w["pool"], w["role"]) for w in cluster.readyz(url).get("workers", ())}
