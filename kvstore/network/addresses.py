"""HOST:PORT addresses: joined, split, listened on and dialled, with IPv6 hosts in brackets.

Hosts are taken with and without brackets. Redis URLs are parsed in kvstore.config and
kvstore.redis_client. Knows nothing of protocols.
"""

import ipaddress
import socket

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Hosts that stand for all addresses of a machine, and where the machine itself reaches a server that listens there."""


def bare_host(host: str) -> str:
    """A host without brackets."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def is_ipv6(host: str) -> bool:
    """Whether this is an IPv6 address, with or without brackets."""
    try:
        return ipaddress.ip_address(bare_host(host)).version == 6
    except ValueError:
        return False


def join_host_port(host: str, port: int) -> str:
    """HOST:PORT, or [HOST]:PORT for an IPv6 address."""
    host = bare_host(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_host_port(address: str) -> tuple[str, int]:
    """The host, without brackets, and the port. Raises ValueError for what is not HOST:PORT."""
    host, _, port = address.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535 or (":" in host) != is_bracketed:
        raise ValueError(f"not HOST:PORT: {address[:100]!r}")
    return bare_host(host), int(port)


def with_port(address: str, port: int) -> str:
    """The same host with another port. Raises ValueError for what is not HOST:PORT."""
    return join_host_port(split_host_port(address)[0], port)


def reachable(host: str) -> str:
    """The host to dial for one to listen on, without brackets."""
    return _ANY.get(bare_host(host), bare_host(host))


def overlap(host: str, other: str) -> bool:
    """Whether servers on the two hosts could not have the same port."""
    hosts = {bare_host(host), bare_host(other)}
    if len(hosts) == 1 or "::" in hosts:
        return True
    if "0.0.0.0" in hosts:
        return not any(":" in each for each in hosts)
    return hosts in ({"localhost", "127.0.0.1"}, {"localhost", "::1"})


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A listening TCP socket; "::" listens for IPv4 too. Raises OSError."""
    family, address = _resolve(host, port)
    is_dual = bare_host(host) == "::" and socket.has_dualstack_ipv6()
    server = socket.create_server(address, family=family, backlog=backlog, dualstack_ipv6=is_dual)
    # Connections inherit it. asyncio sets it only for sockets that were made with a protocol number, as these are not,
    # and then the second part of an answer waits 40 ms for the client's acknowledgement of the first.
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return server


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[object, ...]]:
    """What to bind; of a name with addresses of both kinds, the IPv4 one."""
    found = socket.getaddrinfo(bare_host(host), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    return family, address


def connect(address: str, timeout_s: float) -> socket.socket:
    """A TCP connection to HOST:PORT. Raises OSError, also for what is no address."""
    try:
        host, port = split_host_port(address)
    except ValueError as error:
        raise OSError(str(error)) from None
    return socket.create_connection((host, port), timeout_s)
