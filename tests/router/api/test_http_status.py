"""Readiness and metrics over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from telemetry import worker as worker_metrics
from tests.router.conftest import pair, until
from tests.router.http_calls import BASE, served


async def test_readiness_names_pools_and_tiers_that_are_down(model_dir: Path) -> None:
    prefill, decode = pair()
    async with served(model_dir) as (cluster, client):
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503
        await cluster.add(prefill)
        assert (await client.get("/readyz")).status_code == 503
        decode.load.tier_is_up["host"] = True
        decode.load.tier_is_up["redis"] = False
        decode.load.tier_problems["redis"] = "WRONGPASS"
        await cluster.add(decode)
        await until(lambda: "decode-0" in cluster.router._dispatcher.loads, "its load came")
        response = await client.get("/readyz")
        state = response.json()
        assert response.status_code == 200
        assert (state["is_ready"], state["is_degraded"]) == (True, True)
        assert state["pools"]["prefill"] == {"role": "prefill", "num_workers": 1}
        assert state["tiers_down"] == [{"tier": "redis", "worker_id": "decode-0", "reason": "WRONGPASS"}]


async def test_metrics_count_requests_and_show_workers(model_dir: Path) -> None:
    prefill, decode = pair()
    decode.load = _busy_load()
    async with served(model_dir, prefill, decode) as (cluster, client):
        await until(lambda: "decode-0" in cluster.router._dispatcher.loads, "its load came")
        await client.post("/v1/completions", json=BASE)
        await client.post("/v1/completions", json={**BASE, "max_tokens": 0})
        text = (await client.get("/metrics")).text
    labels = {"pool": "decode", "role": "decode", "worker": "decode-0"}

    def worker(name: str, **more: str) -> str:
        pairs = sorted({**labels, **more}.items())
        return f"switchyard_worker_{name}{{{','.join(f'{key}={chr(34)}{value}{chr(34)}' for key, value in pairs)}}}"

    for line in (
        'switchyard_requests_total{outcome="length"} 1.0',
        'switchyard_requests_total{outcome="invalid_request"} 1.0',
        'switchyard_placements_total{kind="prefill_decode"} 1.0',
        "switchyard_output_tokens_total 12.0",
        "switchyard_prompt_tokens_total 9.0",
        "switchyard_time_to_first_token_seconds_count 1.0",
        "switchyard_time_per_output_token_seconds_count 1.0",
        "switchyard_queue_seconds_count 1.0",
        "switchyard_kv_transfer_seconds_count 1.0",
        "switchyard_kv_transfer_relay_seconds_count 1.0",
        "switchyard_inflight_requests 0.0",
        "switchyard_directory_up 1.0",
        f"{worker('up')} 1.0",
        f"{worker('running_requests')} 3.0",
        f"{worker('recomputed_prompt_tokens_total')} 17.0",
        f"{worker('transferred_blocks_total')} 5.0",
        f"{worker('rejected_fragments_total', reason='checksum')} 2.0",
        f"{worker('tier_up', tier='redis')} 0.0",
    ):
        assert f"\n{line}\n" in text, line
    for declared in worker_metrics.ROUTER_METRICS:
        assert f"# TYPE {declared.name} " in text, "each metric that the documents promise is there"


def _busy_load() -> Any:
    from switchyard.v1 import worker_pb2

    load = worker_pb2.WorkerLoad(
        num_running=3, num_free_blocks=900, num_recomputed_prompt_tokens=17, num_transferred_blocks=5
    )
    load.num_rejected_fragments["checksum"] = 2
    load.tier_is_up["redis"] = False
    return load
