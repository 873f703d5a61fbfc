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
    from deploy.config import ClusterConfig, PoolConfig

_NOTHING = "no decision is kept: none was made yet, or Redis was emptied since"


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
            click.echo(explain_last(lines, last) or _NOTHING)
        return _replay(lines) if replay else 0
    except RecordError as error:
        raise ConfigError(f"{record or 'the decisions in Redis'}: {error}") from None


def _replay(lines: Iterable[str]) -> int:
    from planner.scaling.record import decisions, from_first_start, replay

    lines = list(lines)
    kept = from_first_start(lines)
    if lines and not kept:
        raise StartError(
            "no decision can be made again: the line with which they begin is gone, as after Redis was emptied; the "
            "autoscaler writes another one at its next start, and every hundred decisions"
        )
    num_without = len(lines) - len(kept)
    differences = list(replay(kept))
    for found in differences:
        line = num_without + found.line
        click.echo(f"line {line}: recorded {found.recorded.targets}, made again {found.replayed.targets}")
    without = f"; the first {num_without} lines have no start and were left out" if num_without else ""
    num_again = sum(1 for _ in decisions(kept))
    click.echo(f"{num_again} decisions made again, {len(differences)} came out differently{without}")
    return 1 if differences else 0


def _lines(config_path: str | None, assignments: tuple[str, ...], record: str | None) -> list[str]:
    from kvstore.control.redis_decision_log import DecisionsUnavailable, RedisDecisionLog

    if record is not None:
        try:
            return Path(record).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--from: {record}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    config = _load(config_path, assignments)
    kept = RedisDecisionLog(config.kvstore.control_url, config.name)
    try:
        return kept.last()
    except DecisionsUnavailable as error:
        raise StartError(f"kvstore.control: Redis cannot be reached: {error}") from None
    finally:
        kept.close()


def _set_pin(config_path: str | None, assignments: tuple[str, ...], pin: str | None, unpin: str | None) -> None:
    from deploy.autoscaling.memory import Memory, MemoryUnavailable

    config = _load(config_path, assignments)
    memory = Memory(config.kvstore.control_url, config.name)
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
            raise StartError(f"kvstore.control: Redis cannot be reached: {error}") from None
        click.echo(f"{pool}: " + ("left to the policy" if count is None else f"{count} workers, by hand{unused}"))


def _known_pool(option: str, pool: str, config: ClusterConfig) -> str:
    if pool not in config.pools:
        raise ConfigError(f"{option}: there is no pool {pool[:100]!r}, only {', '.join(config.pools)}")
    return pool


def _pinned_count(pool: PoolConfig, name: str, text: str) -> int:
    is_within = re.fullmatch(r"[0-9]{1,9}", text) is not None and pool.fewest <= int(text) <= pool.most
    if not is_within:
        limits = f"from {pool.fewest} (min_replicas) to {pool.most} (max_replicas)"
        raise ConfigError(f"--pin: {name} must be a number {limits}, not {text[:100]!r}")
    return int(text)


def _load(config_path: str | None, assignments: tuple[str, ...]) -> ClusterConfig:
    from deploy.config import load
    from deploy.standalone import check_standalone

    if config_path is None:
        raise ConfigError("--config: the cluster's YAML is needed, or a record with --from")
    config = load(config_path, assignments)
    check_standalone(config)
    return config
