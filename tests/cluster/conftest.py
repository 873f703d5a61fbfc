"""Fixtures of the whole-cluster tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.fake_cluster import FakeCluster
from tests.fake_shape import Shape
from tests.forked import Prefork


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
