"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def cluster_options(help_text: str = "YAML of the whole cluster.", required: bool = True) -> Callable[[F], F]:
    """Decorator: --config as `config_path` and --set as `assignments`, for deploy.config.load."""

    def decorate(command: F) -> F:
        set_key = click.option(
            "--set", "assignments", multiple=True, metavar="A.B=C", help="Set any key of the configuration."
        )
        config = click.option("--config", "config_path", required=required, metavar="FILE", help=help_text)
        return config(set_key(command))

    return decorate
