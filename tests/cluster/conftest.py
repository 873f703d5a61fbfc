"""Fixtures of the whole-cluster tests, and what they measured, printed at the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.fake_cluster import FakeCluster, Shape, percentile
from tests.forked import Prefork

_MEASURED = pytest.StashKey[dict[str, list[float]]]()


@pytest.fixture(scope="session")
def prefork() -> Iterator[Prefork]:
    """Forks the workers and routers of all fake clusters of this run."""
    process = Prefork()
    yield process
    process.close()


@pytest.fixture
def fake_cluster(prefork: Prefork) -> Iterator[Callable[..., FakeCluster]]:
    """Makes clusters that end with the test: fake_cluster(decode=3, step_s=0.01)."""
    made: list[FakeCluster] = []

    def make(**shape: object) -> FakeCluster:
        made.append(FakeCluster(prefork, Shape(**shape)))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str, float], None]:
    """Takes a duration in seconds under a title, for the summary."""
    found = request.config.stash.setdefault(_MEASURED, {})

    def note(title: str, duration_s: float) -> None:
        found.setdefault(title, []).append(duration_s)

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each title."""
    found = terminalreporter.config.stash.get(_MEASURED, {})
    if found:
        terminalreporter.section("measured by the cluster tests, not asserted")
    for title, durations_s in sorted(found.items()):
        p50, p99 = (1000 * percentile(durations_s, share) for share in (0.5, 0.99))
        most = 1000 * max(durations_s)
        terminalreporter.line(f"{title}: p50 {p50:.0f} ms, p99 {p99:.0f} ms, max {most:.0f} ms of {len(durations_s)}")
