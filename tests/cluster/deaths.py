"""Streams through deaths: when something dies, what is right afterwards, and prompts that share nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from switchyard_client import GenerationClient

from tests.fake_cluster import Answer, FakeCluster
from tests.fake_model import expected
from tests.processes import wait_until

NUM_TOKENS = 64
SPREAD = (0, 1, 2, 3, 15, 16, 31, 48, 62, 63)
EVERY = tuple(range(NUM_TOKENS))
STEP_S = 0.004
MakeCluster = Callable[..., FakeCluster]
Measured = Callable[[str, float], None]

_probes = itertools.count(10_000)


def all_positions(spread: tuple[int, ...], every: tuple[int, ...] = EVERY) -> pytest.MarkDecorator:
    """A spread of positions always, every one of them in the slow run."""
    cases = [pytest.param(spread, id="spread"), pytest.param(every, id="every", marks=pytest.mark.slow)]
    return pytest.mark.parametrize("positions", cases)


def prompt(number: int, num_tokens: int = 30) -> list[int]:
    """Prompts that share nothing."""
    return [(number * 1009 + i * 31 + 7) % 4096 for i in range(num_tokens)]


def busy(cluster: FakeCluster, role: str) -> str:
    """The worker of a role that has a request now, or ""."""
    for name in cluster.workers:
        if name.startswith(role) and cluster.workers[name].is_running:
            load = cluster.load(name)
            if load.num_running + load.num_waiting + load.num_waiting_for_kv:
                return name
    return ""


def at_work(cluster: FakeCluster, role: str) -> str:
    """The same, waited for: on busy cores a decode worker may begin after the client has the first token."""
    name = ""

    def look() -> bool:
        nonlocal name
        name = busy(cluster, role)
        return bool(name)

    wait_until(look, f"a {role} worker has a request")
    return name


class Once:
    """Does something when a stream has got so far, once, and says how long the client then waited."""

    def __init__(self, position: int, action: Callable[[], None]) -> None:
        self.position = position
        self.num_tokens_at_action: int | None = None
        self._action = action

    def __call__(self, answer: Answer) -> None:
        if self.num_tokens_at_action is None and len(answer.ids) >= self.position:
            self.num_tokens_at_action = len(answer.ids)
            self._action()

    def gap_s(self, answer: Answer) -> float:
        """The longest pause from there on."""
        assert self.num_tokens_at_action is not None, "the stream ended before it got so far"
        return answer.longest_gap_s


def check(answer: Answer, number: int, num_prompt_tokens: int = 30, sampled: bool = False) -> None:
    """The stream is the undisturbed one."""
    right = expected(prompt(number, num_prompt_tokens), NUM_TOKENS, 0.8 if sampled else 0.0)
    assert answer.ids == right
    assert answer.finished is not None
    assert answer.finished.num_output_tokens == NUM_TOKENS


def moves(cluster: FakeCluster, client: GenerationClient) -> bool:
    """Whether all ten blocks of a new prompt get from prefill to decode."""
    answer = cluster.ask(client, prompt(next(_probes), 40), 4)
    assert answer.finished is not None
    stats = answer.finished.stats
    return stats.num_transferred_blocks == 10 and stats.num_recomputed_prompt_tokens == 0
