"""HOST:PORT addresses with and without brackets, and real listeners on them."""

from __future__ import annotations

import socket

import pytest

from kvstore.network.addresses import connect, join_host_port, listen, overlap, reachable, split_host_port, with_port


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("127.0.0.1:1", "127.0.0.1", 1),
        ("[::1]:50051", "::1", 50051),
        ("a.b:0", "a.b", 0),
        ("[fe80::1%lo]:2", "fe80::1%lo", 2),
    ],
)
def test_an_address_is_split_and_joined_again(address: str, host: str, port: int) -> None:
    assert split_host_port(address) == (host, port)
    assert join_host_port(host, port) == address


@pytest.mark.parametrize(
    "address", ["", ":1", "::1:50051", "host", "host:", "host:x", "host:65536", "[::1]", "host:\u0661"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="not HOST:PORT"):
        split_host_port(address)


def test_hosts_are_taken_with_and_without_brackets() -> None:
    assert join_host_port("[::1]", 1) == join_host_port("::1", 1) == "[::1]:1"
    assert with_port("[::1]:1", 2) == "[::1]:2"
    assert reachable("::") == reachable("[::]") == "::1"
    assert reachable("0.0.0.0") == "127.0.0.1"
    assert reachable("10.0.0.1") == "10.0.0.1"


def test_servers_that_could_not_have_the_same_port() -> None:
    assert overlap("::", "127.0.0.1")
    assert overlap("0.0.0.0", "10.0.0.1")
    assert overlap("[::1]", "::1")
    assert overlap("localhost", "127.0.0.1")
    assert not overlap("127.0.0.1", "10.0.0.1")
    assert not overlap("0.0.0.0", "::1")


@pytest.mark.parametrize(
    ("host", "callers"),
    [("::1", ["::1"]), ("[::1]", ["::1"]), ("127.0.0.1", ["127.0.0.1"]), ("::", ["::1", "127.0.0.1"])],
)
def test_a_listener_is_reached(host: str, callers: list[str]) -> None:
    with listen(host, 0, backlog=4) as listener:
        port = listener.getsockname()[1]
        for caller in callers:
            with connect(join_host_port(caller, port), 5.0) as connection:
                assert connection.family == (socket.AF_INET6 if ":" in caller else socket.AF_INET)


def test_a_connection_to_nonsense_is_an_oserror() -> None:
    with pytest.raises(OSError, match="not HOST:PORT"):
        connect("::1:1", 1.0)
