"""Fixtures of this package's tests."""

import uuid
from collections.abc import Iterator

import pytest

from tests.kvstore.fragments import SECRET
from tests.processes import KVNode


@pytest.fixture(scope="session")
def peer_node() -> Iterator[KVNode]:
    """A node process that other hosts may pull from, for all tests that leave it running."""
    options = {"peer_address": "127.0.0.1:0"}
    node = KVNode(f"test-{uuid.uuid4().hex[:12]}", slot_bytes=64 * 1024, num_slots=256, options=options, secret=SECRET)
    yield node
    node.close()
