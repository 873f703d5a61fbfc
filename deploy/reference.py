"""All keys of the configuration and of the processes' specs: `python -m deploy.reference > docs/configuration.md`."""

from __future__ import annotations

import inspect
import sys
import typing

from deploy.config import ClusterConfig
from kvstore.config import NodeSpec
from router.config import RouterSpec
from router.model_files import ModelLimits
from settings.docs import table
from workers.config import EngineConfig, SchedulingOptions, WorkerSpec

_HEAD = """# Configuration

Made by `python -m deploy.reference` from the declarations of the fields; a test keeps it fresh.

One YAML file is the whole cluster: `switchyard serve --config FILE`, single keys with `--set kvstore.peers=true`. An
unknown key, one that is given twice or a wrong type ends with exit code 2 and the key's path. `switchyard schema`
prints the JSON schema.
"""

_SPECS = """# The spec of each process

`switchyard serve` writes these files for the processes that it starts, readable by its user alone. A process that is
started by hand reads the same, JSON or YAML: `python -m router --spec FILE`, `python -m workers --spec FILE`,
`python -m kvstore.node --spec FILE`. Each has a branch of the configuration, with all of its keys: `config` of a router
is `router`, `kvstore` of a worker and of a KV node is `kvstore`.
"""


def render() -> str:
    """The document in Markdown."""
    parts = [_HEAD, _section("The cluster", ClusterConfig)]
    for name, hint in typing.get_type_hints(ClusterConfig).items():
        if name == "pools":
            parts.append(_section("`pools.NAME`", typing.get_args(hint)[1]))
            parts.append(_section("`pools.NAME.scheduler`", SchedulingOptions))
        elif hint is not str:
            parts.append(_section(f"`{name}`", hint))
    parts += [
        _SPECS,
        _section("A router", RouterSpec),
        _section("`model_limits` of a router", ModelLimits),
        _section("A worker", WorkerSpec),
        _section("`engine` of a worker", EngineConfig),
        _section("`engine.scheduler` of a worker", SchedulingOptions),
        _section("A KV node", NodeSpec),
    ]
    return "\n".join(parts)


def _section(title: str, cls: type) -> str:
    return "\n".join([f"## {title}", "", inspect.getdoc(cls) or "", "", table(cls)])


if __name__ == "__main__":
    sys.stdout.write(render())
