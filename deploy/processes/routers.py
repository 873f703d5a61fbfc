"""The router processes of this machine: started, watched and restarted on the ports that they had.

Knows nothing of Ray; the routers find their workers by themselves.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.config import EndpointsConfig, child_environment
from deploy.processes.supervise import Ready, SupervisedProcess
from kvstore.network.addresses import join_host_port, reachable, split_host_port
from router.config import RouterConfig, RouterSpec
from settings.loading import write

_READY_TIMEOUT_S = 60.0
_ANSWER_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class RouterEndpoint:
    """Where one router listens."""

    grpc: str
    http: str
    pid: int


def workers_seen(endpoint: RouterEndpoint) -> dict[str, int]:
    """How many workers of each pool a router has found; nothing while it does not answer."""
    return {name: pool["num_workers"] for name, pool in _readyz(endpoint).get("pools", {}).items()}


def first_refusal(endpoint: RouterEndpoint) -> str:
    """Why a router does not use a worker that it found; "" when it uses all."""
    refused = _readyz(endpoint).get("workers_refused", ())
    return f"{refused[0]['worker_id']}: {refused[0]['reason']}" if refused else ""


def _readyz(endpoint: RouterEndpoint) -> dict[str, Any]:
    host, port = split_host_port(endpoint.http)
    connection = http.client.HTTPConnection(reachable(host), port, timeout=_ANSWER_TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        state = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    finally:
        connection.close()
    return state if isinstance(state, dict) else {}


def target_of(endpoint: RouterEndpoint) -> str:
    """Where a client of this machine dials a router."""
    host, port = split_host_port(endpoint.grpc)
    return join_host_port(reachable(host), port)


def router_specs(
    template: RouterSpec, endpoints: EndpointsConfig, config: RouterConfig, cluster_id: str
) -> list[RouterSpec]:
    """One spec per router; each next one has the next higher ports (0 stays 0)."""
    return [
        dataclasses.replace(
            template,
            router_id=f"router-{cluster_id}-{index}",
            grpc_host=endpoints.grpc_host,
            grpc_port=endpoints.grpc_port and endpoints.grpc_port + index,
            http_host=endpoints.http_host,
            http_port=endpoints.http_port and endpoints.http_port + index,
            config=config,
        )
        for index in range(endpoints.routers)
    ]


class Routers:
    """All routers of this machine."""

    def __init__(self, specs: Sequence[RouterSpec], run_dir: Path) -> None:
        self._processes = [_process(spec, run_dir) for spec in specs]

    def start(self) -> None:
        """Begin; does not wait."""
        for process in self._processes:
            process.start()

    def wait_ready(self) -> list[RouterEndpoint]:
        """Where they listen. Raises StartError when one does not come up."""
        said = [process.wait_ready(_READY_TIMEOUT_S) for process in self._processes]
        return [
            RouterEndpoint(ready["grpc_address"], ready["http_address"], process.pid or 0)
            for ready, process in zip(said, self._processes, strict=True)
        ]

    def stop(self, grace_s: float) -> None:
        """End them; running streams have the grace."""
        for process in self._processes:
            process.request_stop()
        for process in self._processes:
            process.stop(grace_s)


def _process(spec: RouterSpec, run_dir: Path) -> SupervisedProcess:
    path = run_dir / f"{spec.router_id}.json"

    def command(before: Ready | None) -> list[str]:
        """Clients keep their address: the next router takes the ports of the one before."""
        current = spec
        if before is not None:
            grpc_port, http_port = (split_host_port(before[key])[1] for key in ("grpc_address", "http_address"))
            current = dataclasses.replace(spec, grpc_port=grpc_port, http_port=http_port)
        write(path, current)
        return [sys.executable, "-P", "-m", "router", "--spec", str(path)]

    return SupervisedProcess(spec.router_id, command, child_environment(), run_dir / f"{spec.router_id}.log")
