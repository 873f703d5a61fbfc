"""`switchyard scale`: what the autoscaler decided and why, decisions made again, and counts set by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploy.commands.options import cluster_options
from deploy.errors import ConfigError, StartError

if TYPE_CHECKING:
    from deploy.autoscaling.memory import Memory
    from deploy.config import ClusterConfig, PoolConfig


@click.command()
@cluster_options("YAML of the whole cluster: its decisions are in Redis.", required=False)
@click.option("--from", "record", metavar="FILE", help="A record of `autoscaler --record`, in place of Redis.")
@click.option("--explain", is_flag=True, help="Print the last decisions and why they were made.")
@click.option("--last", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="How many.")
@click.option("--replay", is_flag=True, help="Make all kept decisions again; exit code 1 if one comes out differently.")
@click.option(
    "--pin",
    metavar="POOL=N",
    help="Set a pool's number of workers by hand, within its limits; the policy leaves it alone.",
)
@click.option("--unpin", metavar="POOL", help="Leave a pool to the policy again.")
def scale(
    config_path: str | None,
    assignments: tuple[str, ...],
    record: str | None,
    explain: bool,
    last: int,
    replay: bool,
    pin: str | None,
    unpin: str | None,
) -> int:
    """Show, check and override what the autoscaler does."""
    from planner.scaling.explain import explain_last
    from planner.scaling.record import RecordError

    if not (explain or replay or pin or unpin):
        raise ConfigError("one of --explain, --replay, --pin and --unpin must be given")
    if pin or unpin:
        _set_pin(config_path, assignments, pin, unpin)
    if not (explain or replay):
        return 0
    lines = _lines(config_path, assignments, record)
    try:
        if explain:
            click.echo(explain_last(lines, last) or "no decision yet")
        return _replay(lines) if replay else 0
    except RecordError as error:
        raise ConfigError(f"{record or 'the decisions in Redis'}: {error}") from None


def _replay(lines: Iterable[str]) -> int:
    from planner.scaling.record import decisions, replay

    lines = list(lines)
    differences = list(replay(lines))
    for found in differences:
        click.echo(f"line {found.line}: recorded {found.recorded.targets}, made again {found.replayed.targets}")
    click.echo(f"{sum(1 for _ in decisions(lines))} decisions made again, {len(differences)} came out differently")
    return 1 if differences else 0


def _lines(config_path: str | None, assignments: tuple[str, ...], record: str | None) -> list[str]:
    from deploy.autoscaling.memory import MemoryUnavailable

    if record is not None:
        try:
            return Path(record).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--from: {record}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    memory, _ = _open(config_path, assignments)
    try:
        return memory.lines()
    except MemoryUnavailable as error:
        raise StartError(f"kvstore.control: {error}") from None


def _set_pin(config_path: str | None, assignments: tuple[str, ...], pin: str | None, unpin: str | None) -> None:
    from deploy.autoscaling.memory import MemoryUnavailable

    memory, config = _open(config_path, assignments)
    wanted: list[tuple[str, int | None]] = []
    if pin:
        pool, _, text = pin.partition("=")
        wanted.append((_known_pool("--pin", pool, config), _pinned_count(config.pools[pool], pool, text)))
    if unpin:
        wanted.append((_known_pool("--unpin", unpin, config), None))
    mode = config.autoscaling.mode
    unused = "" if mode == "act" else f" (autoscaling.mode is {mode}: nobody sees to it)"
    for pool, count in wanted:
        try:
            memory.pin(pool, count)
        except MemoryUnavailable as error:
            raise StartError(f"kvstore.control: {error}") from None
        click.echo(f"{pool}: " + ("left to the policy" if count is None else f"{count} workers, by hand{unused}"))


def _known_pool(option: str, pool: str, config: ClusterConfig) -> str:
    if pool not in config.pools:
        raise ConfigError(f"{option}: there is no pool {pool[:100]!r}, only {', '.join(config.pools)}")
    return pool


def _pinned_count(pool: PoolConfig, name: str, text: str) -> int:
    least, most = pool.min_replicas or pool.replicas, pool.max_replicas or pool.replicas
    is_within = re.fullmatch(r"[0-9]{1,9}", text) is not None and least <= int(text) <= most
    if not is_within:
        limits = f"from {least} (min_replicas) to {most} (max_replicas)"
        raise ConfigError(f"--pin: {name} must be a number {limits}, not {text[:100]!r}")
    return int(text)


def _open(config_path: str | None, assignments: tuple[str, ...]) -> tuple[Memory, ClusterConfig]:
    from deploy.autoscaling.memory import Memory
    from deploy.config import load
    from deploy.standalone import check_standalone

    if config_path is None:
        raise ConfigError("--config: the cluster's YAML is needed, or a record with --from")
    config = load(config_path, assignments)
    check_standalone(config)
    return Memory(config.kvstore.control_url, config.name), config
