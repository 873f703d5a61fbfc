"""`switchyard status`: the cluster on one screen, as a router sees it; on a laptop and on Kubernetes alike."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from deploy.errors import ConfigError, StartError

if TYPE_CHECKING:
    from switchyard.v1 import status_pb2

_TIMEOUT_S = 10.0


@click.command()
@click.option(
    "--target", default="127.0.0.1:50051", metavar="HOST:PORT", show_default=True, help="A router's gRPC address."
)
@click.option("--decisions", type=click.IntRange(0, 100), default=1, show_default=True, help="Decisions to show.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--watch", is_flag=True, help="Show it again each second, until Ctrl-C.")
def status(target: str, decisions: int, as_json: bool, watch: bool) -> int:
    """Show pools, workers, roles, load, tiers and the last scaling decisions. Exit code 1: it cannot serve."""
    if watch and as_json:
        raise ConfigError("--watch and --json exclude each other")
    if watch:
        return _watch(target, decisions)
    found = _ask(target, decisions)
    click.echo(json.dumps(as_mapping(found)) if as_json else "\n".join(screen(found)))
    return 0 if found.is_ready else 1


def _watch(target: str, decisions: int) -> int:
    try:
        while True:
            found = _ask(target, decisions)
            click.clear()
            click.echo("\n".join(screen(found)))
            time.sleep(1.0)
    except KeyboardInterrupt:  # how it is meant to end
        return 0


def _ask(target: str, num_decisions: int) -> status_pb2.GetStatusResponse:
    import grpc
    from switchyard.v1 import status_pb2, status_pb2_grpc

    from kvstore.network.channels import dial

    try:
        with dial(target) as channel:
            stub = status_pb2_grpc.StatusServiceStub(channel)
            request = status_pb2.GetStatusRequest(num_decisions=num_decisions)
            found: status_pb2.GetStatusResponse = stub.GetStatus(request, timeout=_TIMEOUT_S)
    except grpc.RpcError as error:
        raise StartError(f"{target}: {error.code().name}: {error.details()}") from None
    return found


def as_mapping(found: status_pb2.GetStatusResponse) -> dict[str, Any]:
    """All of it, for programs."""
    from google.protobuf.json_format import MessageToDict

    said: dict[str, Any] = MessageToDict(
        found, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    for worker in said["workers"]:
        worker["role"] = worker["role"].removeprefix("WORKER_ROLE_").lower()
    said["decisions"] = [json.loads(line) for line in found.decisions]
    return said


def screen(found: status_pb2.GetStatusResponse) -> Iterator[str]:
    """The lines for people."""
    from planner.scaling.explain import explain_last

    state = "not ready" if not found.is_ready else "degraded" if found.is_degraded else "ready"
    yield f"{found.cluster}: {found.model}, {state}, {found.num_inflight_requests} requests in this router"
    yield ""
    yield from _table(
        ("POOL", "ROLE", "WORKERS", "RUNNING", "WAITING", "QUEUED TOKENS", "KV USED"),
        [_pool_row(name, workers) for name, workers in _by_pool(found.workers).items()],
    )
    yield ""
    yield from _table(
        ("WORKER", "POOL", "ROLE", "RUNNING", "WAITING", "KV USED", "TIERS", "ADDRESS"),
        [_worker_row(worker) for worker in found.workers],
    )
    problems = list(_problems(found))
    if problems:
        yield ""
        yield from problems
    if found.decisions:
        yield ""
        yield explain_last(found.decisions, len(found.decisions))


def _by_pool(workers: Iterable[status_pb2.ListedWorker]) -> dict[str, list[status_pb2.ListedWorker]]:
    pools: dict[str, list[status_pb2.ListedWorker]] = {}
    for worker in workers:
        pools.setdefault(worker.pool, []).append(worker)
    return dict(sorted(pools.items()))


def _pool_row(name: str, workers: Sequence[status_pb2.ListedWorker]) -> tuple[str, ...]:
    loads = [worker.load for worker in workers]
    return (
        name,
        "/".join(sorted({_role(worker) for worker in workers})),
        str(len(workers)),
        str(sum(load.num_running for load in loads)),
        str(sum(load.num_waiting + load.num_waiting_for_kv for load in loads)),
        str(sum(load.num_queued_tokens for load in loads)),
        _kv_used(workers),
    )


def _worker_row(worker: status_pb2.ListedWorker) -> tuple[str, ...]:
    load = worker.load
    tiers = ", ".join(tier if is_up else f"{tier} (down)" for tier, is_up in sorted(load.tier_is_up.items()))
    waiting = load.num_waiting + load.num_waiting_for_kv
    counts = (str(load.num_running), str(waiting), _kv_used([worker]))
    return (worker.worker_id, worker.pool, _role(worker), *counts, tiers or "none", worker.address)


def _role(worker: status_pb2.ListedWorker) -> str:
    from kvstore.control.roles import ROLE_NAMES

    return ROLE_NAMES.get(worker.role, "?")


def _kv_used(workers: Iterable[status_pb2.ListedWorker]) -> str:
    """Share of the KV blocks that requests hold."""
    known = [worker for worker in workers if worker.load.num_free_blocks or worker.load.num_running]
    total = sum(worker.num_blocks for worker in known)
    used = total - sum(worker.load.num_free_blocks for worker in known)
    return f"{100 * used / total:.0f} %" if total else "-"


def _problems(found: status_pb2.GetStatusResponse) -> Iterator[str]:
    if not found.directory_is_up:
        yield "! the directory does not answer: known workers serve on, new ones are not found"
    if not found.streams_can_resume:
        yield "! streams are not written down: they would not survive their router"
    for refused in found.workers_refused:
        yield f"! {refused.worker_id} at {refused.address} is not used: {refused.reason}"
    for worker in found.workers:
        for tier, problem in sorted(worker.load.tier_problems.items()):
            yield f"! {worker.worker_id}: {tier}: {problem}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
