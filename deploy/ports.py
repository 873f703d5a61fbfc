"""The ports that a configuration asks for, and whether two keys ask for the same one. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.network.addresses import overlap

if TYPE_CHECKING:
    from deploy.config import EndpointsConfig, RayConfig


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports of one key of the configuration."""

    key: str
    host: str
    ports: range

    def holds(self, port: int, host: str) -> bool:
        """Whether a server on this port of a host could not be there beside this range's."""
        return port in self.ports and overlap(host, self.host)


def clash(ranges: Sequence[PortRange]) -> str:
    """The first port that two keys ask for, as "key: what is wrong"; "" when there is none."""
    for former, latter in itertools.combinations(ranges, 2):
        for port in latter.ports:
            if former.holds(port, latter.host):
                return f"{latter.key}: port {port} is one of {former.key} too"
    return ""


def wanted_ports(endpoints: EndpointsConfig, ray: RayConfig) -> list[PortRange]:
    """Every port that is asked for by its number, router by router."""
    ranges = [
        PortRange("endpoints.grpc_port", endpoints.grpc_host, _span(endpoints.grpc_port, endpoints.routers)),
        PortRange("endpoints.http_port", endpoints.http_host, _span(endpoints.http_port, endpoints.routers)),
    ]
    if not ray.address:
        dashboard_port = ray.dashboard_port if ray.dashboard else 0
        ranges.append(PortRange("ray.dashboard_port", ray.dashboard_host, _span(dashboard_port, 1)))
        metrics_host = ray.node_ip or "0.0.0.0"
        ranges.append(PortRange("ray.metrics_export_port", metrics_host, _span(ray.metrics_export_port, 1)))
    return ranges


def _span(first: int, count: int) -> range:
    return range(first, first + count) if first else range(0)
