"""`switchyard router`: one router of a cluster whose parts are started apart, as on Kubernetes."""

from __future__ import annotations

import asyncio
import logging
import socket

import click

from deploy.commands.options import cluster_options
from deploy.errors import ConfigError


@click.command()
@cluster_options()
def router(config_path: str, assignments: tuple[str, ...]) -> int:
    """Run one router. SIGTERM lets its streams end, for router.drain_s at the longest."""
    from deploy.config import load
    from deploy.standalone import router_spec
    from router.app import run
    from router.errors import StartupError

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    spec = router_spec(load(config_path, assignments), socket.gethostname())
    try:
        asyncio.run(run(spec, lambda line: click.echo(line)))
    except StartupError as error:
        raise ConfigError(str(error)) from None
    return 0
