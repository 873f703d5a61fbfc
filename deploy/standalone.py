"""What the parts of a cluster derive from its YAML where each is started by itself, as on Kubernetes.

They find each other by the cluster's name in a Redis, so both must be configured. Nothing is drawn: a part that is
started anew finds the others again. Knows nothing of Ray.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from deploy.config import ClusterConfig
from deploy.errors import ConfigError
from deploy.plan import model_name
from deploy.preflight import check_adapters, check_password_files, find_model, tier_secret
from deploy.processes.leftovers import FOLDER_PREFIX
from kvstore.config import is_redis
from kvstore.format.authenticity import cluster_secret
from router.config import RouterSpec


def check_standalone(config: ClusterConfig) -> None:
    """Raises ConfigError for a configuration by which parts that are started apart would not find each other."""
    if not config.name:
        raise ConfigError("name: must be set where routers and pools are started apart: they find each other by it")
    kvstore = config.kvstore
    if not is_redis(kvstore.control):
        raise ConfigError(
            "kvstore.control: must be a redis:// URL where routers and pools are started apart, "
            f"not {kvstore.control!r}: that is in the memory of `switchyard serve`"
        )
    leaves_host = [name for name in ("tier", "peers", "disk_bytes") if getattr(kvstore, name)]
    if leaves_host and not kvstore.tier_secret_file:
        raise ConfigError(
            f"kvstore.tier_secret_file: must be set with kvstore.{leaves_host[0]} where pools are started apart: a "
            "block counts only if it was made by somebody who knows the secret"
        )
    check_password_files(kvstore)


def shared_secret(config: ClusterConfig) -> str:
    """Of what leaves a host's memory; the same in every part. Raises ConfigError."""
    return cluster_secret(tier_secret(config.kvstore.tier_secret_file), config.name)


def cluster_id(config: ClusterConfig) -> str:
    """Tells this cluster's folders and Ray actors from those of others."""
    return hashlib.blake2b(config.name.encode(), digest_size=4, person=b"sy cluster id").hexdigest()


def run_dir(config: ClusterConfig) -> Path:
    """Folder for sockets and logs, the same on every host."""
    return Path(config.ray.temp_dir) / f"{FOLDER_PREFIX}{cluster_id(config)}"


def router_spec(config: ClusterConfig, host_name: str) -> RouterSpec:
    """The spec of the router of this host. Raises ConfigError.

    It reads no weights: those that its workers serve are taken for the right ones.
    """
    check_standalone(config)
    model = find_model(config)
    endpoints, control = config.endpoints, config.kvstore.control_url
    name = model_name(config, model.reference)
    adapters = check_adapters(config, model, name)
    return RouterSpec(
        router_id=f"router-{host_name}-{endpoints.grpc_port}",
        model_dir=str(model.directory),
        model_name=name,
        control=control,
        journal=control,
        grpc_host=endpoints.grpc_host,
        grpc_port=endpoints.grpc_port,
        http_host=endpoints.http_host,
        http_port=endpoints.http_port,
        generation_config=config.model.generation_config,
        config=config.router,
        cluster=config.name,
        ignore_keys=config.model.ignore_keys,
        model_limits=model.limits,
        adapters=adapters,
        adapter_targets=model.adapter_targets if adapters.enabled else (),
        adapter_registry=control,
    )
