"""SIGKILL under streams of the real engine on two ranks: in batch-invariant mode the stream is the undisturbed one."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable

import psutil
import pytest
from switchyard_client import GenerationClient

from tests.cluster.deaths import NUM_TOKENS, Once, busy, prompt
from tests.fake_cluster import Answer, FakeCluster
from tests.fake_model import DEMO

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

Measured = Callable[[str, float], None]


def kill_rank(cluster: FakeCluster, name: str, rank: int) -> None:
    """Rank 0 is the process that we know, the other one its child."""
    leader = psutil.Process(cluster.workers[name].pid)
    pid = leader.pid if rank == 0 else leader.children()[0].pid
    os.kill(pid, signal.SIGKILL)
    leader.wait(60)  # a worker ends when any of its ranks does


@pytest.mark.parametrize(
    ("split", "rank"),
    [
        pytest.param({"tp": 2}, 0, id="tp2-leader"),
        pytest.param({"tp": 2}, 1, id="tp2-follower", marks=pytest.mark.slow),
        pytest.param({"pp": 2}, 0, id="pp2-leader", marks=pytest.mark.slow),
        pytest.param({"pp": 2}, 1, id="pp2-follower"),
    ],
)
def test_a_stream_goes_on_elsewhere_when_a_rank_is_stopped(
    fake_cluster: Callable[..., FakeCluster], split: dict[str, int], rank: int
) -> None:
    """A stopped process closes no connection: its leader, or for the leader itself its router, finds out."""
    engine = {"runner": "torch", "batch_invariant": True, "rank_silence_s": 2.0, **split}
    cluster = fake_cluster(prefill=0, decode=0, mixed=2, routers=1, model_dir=str(DEMO), block_size=16, engine=engine)
    client = cluster.client()
    undisturbed = cluster.ask(client, prompt(1, 40), NUM_TOKENS, lambda _: None).ids
    stopped: list[int] = []

    def stop() -> None:
        leader = psutil.Process(cluster.workers[busy(cluster, "mixed")].pid)
        stopped.append(leader.pid if rank == 0 else leader.children()[0].pid)
        os.kill(stopped[0], signal.SIGSTOP)

    answer = cluster.ask(client, prompt(1, 40), NUM_TOKENS, Once(17, stop))
    assert answer.ids == undisturbed
    assert answer.finished is not None
    assert answer.finished.stats.num_replacements == 1
    with contextlib.suppress(ProcessLookupError):  # a follower ends with its leader
        os.kill(stopped[0], signal.SIGKILL)


def test_a_stream_of_two_ranks_goes_on_with_the_same_bits(
    fake_cluster: Callable[..., FakeCluster], measured: Measured
) -> None:
    engine = {"runner": "torch", "tp": 2, "batch_invariant": True}
    cluster = fake_cluster(prefill=1, model_dir=str(DEMO), block_size=16, engine=engine)
    client = cluster.client()

    def ask(temperature: float, once: Callable[[Answer], None], through: GenerationClient = client) -> Answer:
        return cluster.ask(through, prompt(1, 40), NUM_TOKENS, once, temperature=temperature, seed=5)

    undisturbed = {temperature: ask(temperature, lambda _: None).ids for temperature in (0.0, 0.9)}
    assert undisturbed[0.0] != undisturbed[0.9]
    num_replaced = 0
    for number, position in enumerate((1, 2, 17, 40, 62)):
        killed: list[str] = []

        def kill(killed: list[str] = killed, rank: int = number % 2) -> None:
            name = busy(cluster, "decode")
            if name:
                killed.append(name)
                kill_rank(cluster, name, rank)

        once = Once(position, kill)
        temperature = (0.0, 0.9)[position % 2]
        answer = ask(temperature, once)
        assert answer.ids == undisturbed[temperature], f"after the death at {position}"
        assert answer.finished is not None
        num_replaced += answer.finished.stats.num_replacements
        if killed:
            measured("pause at a decode worker's death, real engine on two ranks", once.gap_s(answer))
        for name in killed:
            cluster.restart(name)
        cluster.wait_complete()
    assert num_replaced >= 3, "the last ones may have sent all tokens before they died"
    once = Once(20, lambda: cluster.kill("router-0"))
    answer = ask(0.9, once)
    assert answer.ids == undisturbed[0.9]
    measured("pause at a router's death, real engine on two ranks", once.gap_s(answer))
    cluster.wait_at_rest()
