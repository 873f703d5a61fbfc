"""Epochs of leases, with real processes: who was stopped for too long comes back as another, who was not does not."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvstore.connect import open_directory
from kvstore.control.directory import DirectoryUnavailable
from tests.cluster.deaths import NUM_TOKENS, Once, busy, check, prompt
from tests.fake_cluster import FakeCluster
from tests.processes import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def epochs(cluster: FakeCluster) -> dict[str, int]:
    """Of the leases that are alive, by worker id."""
    with contextlib.closing(open_directory(cluster.control_url, "")) as directory:
        try:
            return {worker.record.worker_id: worker.epoch for worker in directory.workers()}
        except DirectoryUnavailable:
            return {}


def test_a_worker_that_was_stopped_for_longer_than_its_lease_is_another(
    fake_cluster: Callable[..., FakeCluster],
) -> None:
    """The router would wait for it for a minute: only the lease says that it was away."""
    cluster = fake_cluster(
        prefill=0, decode=0, mixed=2, routers=1, step_s=0.01, router={"worker_silence_s": 60.0, "max_replacements": 1}
    )
    before = epochs(cluster)
    stopped: list[str] = []

    def stop() -> None:
        stopped.append(busy(cluster, "mixed"))
        cluster.workers[stopped[0]].signal(signal.SIGSTOP)

    with ThreadPoolExecutor(1) as threads:
        answered = threads.submit(cluster.ask, cluster.client(), prompt(1), NUM_TOKENS, Once(5, stop))
        wait_until(lambda: bool(stopped), "it was stopped in the middle of the stream")
        worker_id = cluster.workers[stopped[0]].ready["worker_id"]
        wait_until(lambda: worker_id not in epochs(cluster), "its lease ran out")
        cluster.workers[stopped[0]].signal(signal.SIGCONT)
        answer = answered.result()
    check(answer, 1)
    assert answer.finished is not None
    assert answer.finished.stats.num_replacements == 1
    assert epochs(cluster)[worker_id] > max(before.values())
    cluster.wait_complete()
    cluster.wait_at_rest()
    check(cluster.ask(cluster.client(), prompt(2), NUM_TOKENS), 2)


def test_streams_run_on_when_the_directory_forgets(fake_cluster: Callable[..., FakeCluster]) -> None:
    """The node has the leases: another one knows nothing. No epoch advances, so no worker is dialled anew."""
    cluster = fake_cluster(
        prefill=0,
        decode=0,
        mixed=1,
        routers=1,
        uses_arena=False,
        step_s=0.05,
        router={"worker_silence_s": 60.0, "max_replacements": 0},
    )
    before = epochs(cluster)

    def lose() -> None:
        cluster.kill("node")
        cluster.restart("node")

    answer = cluster.ask(cluster.client(), prompt(1), NUM_TOKENS, Once(5, lose))
    check(answer, 1)
    wait_until(lambda: epochs(cluster) == before, "the same lease is there again")
    cluster.wait_complete()
    cluster.wait_at_rest()
