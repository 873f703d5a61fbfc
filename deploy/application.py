"""One pool as a Ray Serve application, made of the cluster's YAML: `import_path: deploy.application:build`.

A RayService names it in its serveConfigV2, once for each pool, and nobody else drives the cluster. Serve builds it on
any node of the Ray cluster, so each has the YAML and the model's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from deploy.config import ClusterConfig, load
from deploy.draft_model import check_draft
from deploy.errors import ConfigError
from deploy.plan import layers_per_fragment, make_plan
from deploy.preflight import check_model
from deploy.standalone import check_standalone, cluster_id, run_dir, shared_secret

if TYPE_CHECKING:
    from ray import serve

_ARGUMENTS = {"config", "pool"}


def build(arguments: Mapping[str, str]) -> serve.Application:
    """The application of one pool. Raises ConfigError.

    arguments: `config`, the path of the cluster's YAML, and `pool`, the pool's name in it.
    """
    from deploy.actors.kv_nodes import KVNodeSettings
    from deploy.actors.pools import pool_application

    if set(arguments) != _ARGUMENTS:
        raise ConfigError(f"args: must be config and pool, not {', '.join(sorted(arguments)) or 'empty'}")
    path, name = arguments["config"], arguments["pool"]
    config = load(path)
    if name not in config.pools:
        raise ConfigError(f"{path}: pools: there is no {name!r}, only {', '.join(config.pools)}")
    check_standalone(config)
    _check_devices(config)
    model = check_model(config)
    layers_per_fragment(config, model.config.cache_specs)
    secret = shared_secret(config)
    plan = make_plan(
        config,
        model.config,
        model.reference,
        0.0,
        config.kvstore.control_url,
        secret,
        cluster=config.name,
        draft_dir=check_draft(config, model),
    )
    settings = KVNodeSettings(
        cluster_id=cluster_id(config),
        cluster=config.name,
        run_dir=str(run_dir(config)),
        arena=plan.arena,
        control_node_id="",
        control_address="",
        kvstore=config.kvstore,
        secret=secret,
    )
    (pool,) = (pool for pool in plan.pools if pool.name == name)
    return pool_application(pool, settings)


def _check_devices(config: ClusterConfig) -> None:
    """The Ray cluster may have no node yet, so what it has says nothing."""
    for name, pool in config.pools.items():
        if pool.device == "auto" and config.engine.runner != "fake":
            raise ConfigError(f"pools.{name}.device: must be cpu or cuda where pools are started apart, not 'auto'")
