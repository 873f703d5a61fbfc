"""Addresses become the right clients; addresses that are none are refused by the name of their key."""

import subprocess
import sys

import pytest

from kvstore.config import KVStoreConfig
from kvstore.connect import locations_of, open_directory, open_tiers
from kvstore.control.redis_directory import RedisDirectory
from kvstore.control.remote_directory import RemoteDirectory
from tests.processes import REPOSITORY, KVNode, RedisServer, free_port, python_environment


def test_directories_by_url() -> None:
    port = free_port()
    remote, in_redis = open_directory(f"memory://127.0.0.1:{port}", ""), open_directory(f"redis://127.0.0.1:{port}", "")
    assert isinstance(remote, RemoteDirectory)
    assert isinstance(in_redis, RedisDirectory)
    remote.close()
    in_redis.close()


@pytest.mark.parametrize("url", ["", "memory://", "http://host:1", "127.0.0.1:5"])
def test_other_control_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^control: "):
        open_directory(url, "")


@pytest.mark.redis
def test_tiers_in_the_order_in_which_they_are_asked(peer_node: KVNode, redis_server: RedisServer) -> None:
    tiers = open_tiers(
        peer_node.host_address, KVStoreConfig(tier=redis_server.url, peers=True), "secret", redis_server.url
    )
    assert [(tier.name, tier.is_up) for tier in tiers] == [("host", True), ("peer", True), ("redis", True)]
    locations = [locations_of(tier, "here") for tier in tiers]
    assert locations == [["host:here", f"peer:{peer_node.ready['peer_address']}"], [], ["redis"]]
    for tier in tiers:
        tier.close()


def test_no_addresses_no_tiers() -> None:
    assert open_tiers("", KVStoreConfig()) == []


def test_a_process_that_closes_nothing_still_ends() -> None:
    program = f"""
from kvstore.config import KVStoreConfig
from kvstore.connect import open_directory, open_tiers
port = {free_port()}
tiers = open_tiers(f"127.0.0.1:{{port}}", KVStoreConfig(tier=f"redis://127.0.0.1:{{port}}"), "secret")
directory = open_directory(f"memory://127.0.0.1:{{port}}", "")
print([tier.is_up for tier in tiers])
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=python_environment(), cwd=REPOSITORY, check=True
    )
    assert result.stdout.strip() == "[False, False]"
    assert "Traceback" not in result.stderr
