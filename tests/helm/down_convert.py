"""Objects for a current Kubernetes as Kubernetes 1.20 takes them. Also a post-renderer of helm: YAML in, YAML out.

The older server has neither gRPC probes nor the final versions of two groups. Everything else stays as it is.
"""

from __future__ import annotations

import sys
from typing import Any

import yaml

_VERSIONS = {
    ("policy/v1", "PodDisruptionBudget"): "policy/v1beta1",
    ("autoscaling/v2", "HorizontalPodAutoscaler"): "autoscaling/v2beta2",
}


def down_converted(item: Any) -> Any:
    """A copy."""
    if isinstance(item, list):
        return [down_converted(part) for part in item]
    if not isinstance(item, dict):
        return item
    made = {key: down_converted(value) for key, value in item.items()}
    if isinstance(made.get("grpc"), dict) and "port" in made["grpc"]:
        made["tcpSocket"] = {"port": made.pop("grpc")["port"]}
    version = _VERSIONS.get((str(item.get("apiVersion")), str(item.get("kind"))))
    return {**made, "apiVersion": version} if version else made


if __name__ == "__main__":
    items = [down_converted(item) for item in yaml.safe_load_all(sys.stdin) if item]
    yaml.safe_dump_all(items, sys.stdout, sort_keys=False)
