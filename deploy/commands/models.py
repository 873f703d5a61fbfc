"""`switchyard models`: the files of models."""

from __future__ import annotations

import click

from deploy.commands.options import cluster_options


@click.group()
def models() -> None:
    """The files of the served model."""


@models.command()
@cluster_options()
def fetch(config_path: str, assignments: tuple[str, ...]) -> int:
    """Fetch a model of the Hub into the cache (HF_HOME) and check all of its files, so that workers load at once."""
    from deploy.config import load
    from deploy.preflight import check_model, read_weights

    config = load(config_path, assignments)
    model = check_model(config)
    digest = read_weights(config, model)
    click.echo(f"{model.reference}: whole, in {model.directory}; weights {digest}")
    return 0
