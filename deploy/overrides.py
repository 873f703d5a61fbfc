"""Turns the flags of `switchyard serve` into keys of the configuration, so that there is one way to check them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy import config
from deploy.config import ClusterConfig
from deploy.errors import ConfigError
from workers.config import ROLES


@dataclass(frozen=True, slots=True)
class ServeFlags:
    """Flags that were given; None where one was not."""

    model: str | None = None
    prefill: int | None = None
    decode: int | None = None
    mixed: int | None = None
    routers: int | None = None
    tp: int | None = None
    pp: int | None = None
    grpc_port: int | None = None
    http_port: int | None = None
    speculative_config: str | None = None
    enable_lora: bool | None = None
    lora_modules: Sequence[str] = ()
    """NAME=PATH each."""
    lora_root: str | None = None
    max_loras: int | None = None
    max_lora_rank: int | None = None
    max_cpu_loras: int | None = None


def load_with_flags(path: str | None, flags: ServeFlags, assignments: Sequence[str]) -> ClusterConfig:
    """File, then flags, then `--set`. Raises ConfigError."""
    raw = config.read_yaml(path) if path is not None else {}
    _apply_pools(raw, flags)
    for key, value in (
        ("model.path", flags.model),
        ("endpoints.routers", flags.routers),
        ("endpoints.grpc_port", flags.grpc_port),
        ("endpoints.http_port", flags.http_port),
        ("adapters.enabled", flags.enable_lora),
        ("adapters.modules", _modules(flags.lora_modules)),
        ("adapters.root", flags.lora_root),
        ("adapters.max_loras", flags.max_loras),
        ("adapters.max_lora_rank", flags.max_lora_rank),
        ("adapters.max_cpu_loras", flags.max_cpu_loras),
    ):
        if value is not None:
            branch, name = key.split(".")
            _branch(raw, branch)[name] = value
    if flags.speculative_config is not None:
        raw["speculative"] = {**(raw.get("speculative") or {}), **_json_object(flags.speculative_config)}
        if "method" not in raw["speculative"]:
            raise ConfigError("--speculative-config: method: missing")
    for assignment in assignments:
        config.set_key(raw, assignment)
    return config.parse(raw, path or "")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no key is given twice. Raises ConfigError."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"--speculative-config: {key} is given twice")
    return dict(pairs)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--speculative-config: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError("--speculative-config: must be a JSON object with the keys of the branch `speculative`")
    return value


def _modules(assignments: Sequence[str]) -> dict[str, str] | None:
    """Directories by name, of NAME=PATH each. Raises ConfigError."""
    modules: dict[str, str] = {}
    for assignment in assignments:
        name, _, path = assignment.partition("=")
        if not name or not path:
            raise ConfigError(f"--lora-modules {assignment}: must look like NAME=PATH")
        if name in modules:
            raise ConfigError(f"--lora-modules {assignment}: {name} is named twice")
        modules[name] = path
    return modules or None


def _apply_pools(raw: dict[str, Any], flags: ServeFlags) -> None:
    counts = {role: getattr(flags, role) for role in ROLES}
    if raw.get("pools") is None:
        # `--mixed 2` alone means a cluster of mixed workers, not two besides the default pair.
        only_mixed = flags.mixed and flags.prefill is None and flags.decode is None
        raw["pools"] = {} if only_mixed else config.default_pools()
    pools = raw["pools"]
    if not isinstance(pools, dict):
        return  # parse says what is wrong
    for role, count in counts.items():
        if count is not None:
            _set_replicas(pools, role, count)
    for pool in pools.values():
        if isinstance(pool, dict):
            pool.update({name: getattr(flags, name) for name in ("tp", "pp") if getattr(flags, name) is not None})


def _set_replicas(pools: dict[str, Any], role: str, count: int) -> None:
    names = [name for name, pool in pools.items() if isinstance(pool, dict) and pool.get("role") == role]
    if len(names) > 1:
        raise ConfigError(
            f"--{role}: several pools have that role ({', '.join(names)}); use --set pools.NAME.replicas=N"
        )
    if count < 0:
        raise ConfigError(f"--{role}: must be >= 0, not {count}")
    name = names[0] if names else role
    if count == 0:
        pools.pop(name, None)
    else:
        pools.setdefault(name, {"role": role})["replicas"] = count


def _branch(raw: dict[str, Any], name: str) -> dict[str, Any]:
    branch = raw.get(name)
    if branch is None:
        branch = raw[name] = {}
    if not isinstance(branch, dict):
        raise ConfigError(f"{name}: must hold keys and values")
    return branch
