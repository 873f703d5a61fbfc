"""What this host has and allows: ports, addresses, folders, memory. Knows nothing of models and tiers.

Actors import it: it brings in little.
"""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Collection
from typing import TYPE_CHECKING

import psutil

from deploy.errors import ConfigError, StartError
from deploy.ports import wanted_ports
from kvstore.network.addresses import bare_host, join_host_port, listen, split_host_port

if TYPE_CHECKING:
    from deploy.config import EndpointsConfig, RayConfig

_REACH_TIMEOUT_S = 2.0


def check_ports(endpoints: EndpointsConfig, ray: RayConfig) -> None:
    """See that every port that was asked for is free. Raises ConfigError naming the first that is not."""
    for wanted in wanted_ports(endpoints, ray):
        for port in wanted.ports:
            problem = _bind_problem(wanted.host, port)
            if problem:
                raise ConfigError(f"{wanted.key}: {problem}")


def check_node_ip(node_ip: str) -> None:
    """See that Ray can listen there; on another machine's address its start would hang. Raises ConfigError."""
    if bare_host(node_ip) in ("0.0.0.0", "::"):
        raise ConfigError(f"ray.node_ip: {node_ip} stands for all addresses, and others must be told one of them")
    problem = _bind_problem(node_ip, 0) if node_ip else ""
    if problem:
        raise ConfigError(f"ray.node_ip: {problem}")


def check_ray(address: str) -> None:
    """See that the Ray cluster to join is there; Ray itself would try for minutes. Raises StartError."""
    try:
        host, port = split_host_port(address)
    except ValueError:
        raise ConfigError(f"ray.address: must be HOST:PORT, not {address!r}") from None
    problem = _dial_problem(host, port)
    if problem:
        raise StartError(f"ray.address: no Ray cluster at {address} ({problem})")


def check_folder(key: str, folder: str) -> None:
    """See that files can be made in a folder that is there, by making one without a name. Raises ConfigError."""
    if not os.path.isdir(folder):
        why = "not a folder" if os.path.exists(folder) else "no such folder"
        raise ConfigError(f"{key}: {folder}: {why}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except PermissionError:
        raise ConfigError(f"{key}: {folder}: not allowed to make files there") from None
    except OSError as error:
        raise ConfigError(f"{key}: {folder}: no files can be made there ({error.strerror})") from None


def check_host_memory(key: str, num_bytes: int) -> None:
    """See that this machine has so much memory at all. Raises ConfigError."""
    if num_bytes > memory_bytes():
        raise ConfigError(f"{key}: {num_bytes} is more than this machine's memory ({memory_bytes()})")


def free_port(host: str, first: int = 0, reserved: Collection[int] = ()) -> int:
    """A free port of this machine that is not reserved: the first from `first` up, or any one."""
    for port in range(first, first + 200) if first else ():
        if port not in reserved and not _bind_problem(host, port):
            return port
    with listen(host, 0, backlog=1) as probe:
        return int(probe.getsockname()[1])


def memory_bytes() -> int:
    """All of this machine's memory."""
    return int(psutil.virtual_memory().total)


def has_gpu_driver() -> bool:
    """Whether Ray may find GPUs on this machine."""
    return os.path.exists("/dev/nvidiactl")


def _bind_problem(host: str, port: int) -> str:
    """Why a port cannot be listened on, or ""."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(bare_host(host), port, type=socket.SOCK_STREAM)[0]
    except OSError:
        return f"{host} is not an address of this machine"
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except PermissionError:
            return f"not allowed to listen on port {port}"
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return f"{host} is not an address of this machine"
            is_taken = error.errno == errno.EADDRINUSE
            return f"port {port} on {host} is in use" if is_taken else f"{join_host_port(host, port)}: {error.strerror}"
    return ""


def _dial_problem(host: str, port: int) -> str:
    """Why nothing can be reached there, or ""."""
    try:
        with socket.create_connection((host, port), timeout=_REACH_TIMEOUT_S):
            return ""
    except OSError as error:
        return (error.strerror or str(error) or "no answer").lower()
