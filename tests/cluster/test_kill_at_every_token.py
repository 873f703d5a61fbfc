"""SIGKILL for each kind of process at each position of a stream: no token is lost, doubled or changed.

A spread of positions in every run, all of them in the slow one. The longest pause that the client saw is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from switchyard_client import GenerationClient

from tests.cluster.deaths import (
    NUM_TOKENS,
    SPREAD,
    STEP_S,
    MakeCluster,
    Measured,
    Once,
    all_positions,
    busy,
    check,
    moves,
    prompt,
)
from tests.fake_cluster import Answer, FakeCluster
from tests.processes import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

NUM_CHUNKS = 8
CHUNK_TOKENS = 16


@all_positions(SPREAD)
def test_the_decode_worker_may_die_at_any_token(
    fake_cluster: MakeCluster, measured: Measured, positions: tuple[int, ...]
) -> None:
    cluster = fake_cluster(step_s=STEP_S)
    client = cluster.client()
    num_replaced = 0
    for number, position in enumerate(positions):
        killed: list[str] = []

        def kill(killed: list[str] = killed) -> None:
            name = busy(cluster, "decode")
            if name:
                cluster.kill(name)
                killed.append(name)

        once = Once(position, kill)
        is_sampled = number % 2 == 1
        answer = cluster.ask(client, prompt(number), NUM_TOKENS, once, temperature=0.8 if is_sampled else 0.0)
        check(answer, number, sampled=is_sampled)
        measured("pause at a decode worker's death", once.gap_s(answer))
        assert answer.finished is not None
        num_replaced += answer.finished.stats.num_replacements
        for name in killed:
            cluster.start_worker(name)
        cluster.wait_complete()
    # Whoever is killed may have sent all tokens already, the more so on a slow machine: nothing is left to be placed.
    assert num_replaced >= len(positions) // 3
    cluster.wait_at_rest()


@all_positions((0, 1, 4, NUM_CHUNKS), every=tuple(range(NUM_CHUNKS + 1)))
@pytest.mark.parametrize("victim", ["prefill", "decode", "node"])
def test_a_process_may_die_at_each_phase_of_prefill(
    fake_cluster: MakeCluster, measured: Measured, victim: str, positions: tuple[int, ...]
) -> None:
    """positions: in chunks of the prompt."""
    options = {"max_num_batched_tokens": CHUNK_TOKENS}
    cluster = fake_cluster(step_s=STEP_S, token_s=0.001, engine=options)
    client = cluster.client()
    num_recomputed = 0
    for phase in positions:
        before = {name: cluster.load(name).num_steps for name in cluster.workers if name.startswith("prefill")}
        killed: list[str] = []

        def wait_and_kill(before: dict[str, int] = before, phase: int = phase, killed: list[str] = killed) -> None:
            """In a thread of its own: the client sees nothing of what goes on before the first token."""
            names: list[str] = []

            def has_begun() -> bool:
                names[:] = [name for name in before if cluster.load(name).num_steps - before[name] >= phase]
                if phase == 0:
                    names[:] = [busy(cluster, "prefill")]
                return bool(names and names[0])

            wait_until(has_begun, f"a prefill worker got to chunk {phase}")
            doomed = {"prefill": names[0], "decode": busy(cluster, "decode"), "node": "node"}[victim]
            if doomed:
                cluster.kill(doomed)
            killed.append(doomed)

        number = 1000 + phase
        num_prompt_tokens = NUM_CHUNKS * CHUNK_TOKENS - 3
        answer, pause_s = ask_while(cluster, client, number, num_prompt_tokens, wait_and_kill)
        check(answer, number, num_prompt_tokens)
        measured(f"first token or next one when the {victim} process dies in prefill", pause_s)
        assert answer.finished is not None
        num_recomputed += answer.finished.stats.num_recomputed_prompt_tokens
        for name in killed:
            if name:
                cluster.restart(name)
        cluster.wait_complete()
    if victim == "prefill":
        assert num_recomputed > 0, "no decode worker ever had to go on alone: nothing was killed in time"
    cluster.wait_at_rest()


def ask_while(
    cluster: FakeCluster, client: GenerationClient, number: int, num_prompt_tokens: int, action: Callable[[], None]
) -> tuple[Answer, float]:
    """A stream, and beside it the action; the longest pause of the client, the time to the first token included."""
    with ThreadPoolExecutor(1) as threads:
        began_s = time.monotonic()
        done = threads.submit(action)
        answer = cluster.ask(client, prompt(number, num_prompt_tokens), NUM_TOKENS)
        done.result()
    return answer, max(answer.longest_gap_s, answer.times_s[1] - began_s)


@all_positions((0, 1, 2, 31, 62, 63))
def test_the_router_may_die_at_any_token(
    fake_cluster: MakeCluster, measured: Measured, positions: tuple[int, ...]
) -> None:
    cluster = fake_cluster(step_s=STEP_S)
    for number, position in enumerate(positions):
        first = number % 2
        name = f"router-{first}"
        once = Once(position, lambda name=name: cluster.kill(name))
        client = cluster.client(first)
        is_sampled = number % 2 == 1
        answer = cluster.ask(client, prompt(number), NUM_TOKENS, once, temperature=0.8 if is_sampled else 0.0)
        check(answer, number, sampled=is_sampled)
        measured("pause at a router's death", once.gap_s(answer))
        client.close()
        cluster.start_router(name)
        cluster.wait_complete()
    cluster.wait_at_rest()


@all_positions((0, 1, 31, 63))
def test_the_kv_node_may_die_at_any_token(
    fake_cluster: MakeCluster, measured: Measured, positions: tuple[int, ...]
) -> None:
    """It holds the arena, the leases and the directory."""
    cluster = fake_cluster(step_s=STEP_S)
    client = cluster.client()
    for number, position in enumerate(positions):
        once = Once(position, lambda: cluster.kill("node"))
        answer = cluster.ask(client, prompt(number), NUM_TOKENS, once)
        check(answer, number)
        measured("pause at a KV node's death", once.gap_s(answer))
        cluster.node.start()
    cluster.wait_complete()
    after = cluster.ask(client, prompt(5000, 60), NUM_TOKENS)
    check(after, 5000, 60)
    wait_until(lambda: moves(cluster, client), "blocks move again")
    cluster.wait_at_rest()
