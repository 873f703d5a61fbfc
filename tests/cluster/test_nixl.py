"""Two hosts whose workers read each other's KV blocks by NIXL: KV transfers, and a node that is killed between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from tests.fake_cluster import FakeCluster
from tests.fake_model import expected
from tests.processes import wait_until

pytestmark = pytest.mark.cluster


def test_kv_transfer_by_nixl_and_without_the_node(fake_cluster: Callable[..., FakeCluster]) -> None:
    pytest.importorskip("nixl")
    cluster = fake_cluster(prefill=1, decode=1, routers=1, hosts=2, peers=True, peer_transport="nixl")
    client, lengths = cluster.client(), itertools.count(40)

    def pulled_bytes_after_a_stream() -> int:
        """Of a prompt that no worker has seen."""
        length = next(lengths)
        prompt = [(7 * i + length) % 200 for i in range(length)]
        assert cluster.ask(client, prompt, 8).ids == expected(prompt, 8)
        return cluster.load("decode-0").pulled_bytes["peer"]

    wait_until(lambda: pulled_bytes_after_a_stream() > 0, "the other node is read from")
    load = cluster.load("decode-0")
    assert set(load.num_rejected_fragments) <= {"truncated"}  # where connecting took too long, on a slow machine
    before = load.pulled_bytes["peer"]
    cluster.node_of("prefill-0").restart()
    wait_until(lambda: pulled_bytes_after_a_stream() > before, "the new node is read from")
