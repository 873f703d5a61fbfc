"""The router as a process: its spec, its ports, its end."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from switchyard_client import GenerationError

from kvstore.connect import open_directory
from kvstore.control.directory import WorkerRecord
from router.app import _epochs
from router.config import RouterConfig, RouterSpec
from settings.loading import SettingsError, load, write
from tests.processes import KVNode, python_environment
from tests.router.api.asking import PROMPT, collect, request
from tests.router.conftest import config_with, running_cluster, until
from tests.router.fake_worker import FakeWorker, expected_tokens

ROOT = Path(__file__).resolve().parents[2]


def spec_file(directory: Path, model: Path, **changes: object) -> Path:
    spec = RouterSpec("router-0", str(model), "tiny", "memory://127.0.0.1:1", grpc_port=0, http_port=0)
    content = {**dataclasses.asdict(spec), **changes}
    path = directory / "spec.json"
    path.write_text(json.dumps(content))
    return path


@contextmanager
def process(spec: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "router", "--spec", str(spec)]
    with subprocess.Popen(
        command, cwd=ROOT, env=python_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            yield child
        finally:
            if child.poll() is None:
                child.kill()


def test_it_says_where_it_listens_and_ends_on_sigterm(tmp_path: Path, model_dir: Path) -> None:
    with process(spec_file(tmp_path, model_dir)) as child:
        assert child.stdout is not None
        addresses = json.loads(child.stdout.readline())
        url = f"http://{addresses['http_address']}"
        assert httpx.get(f"{url}/healthz").status_code == 200
        ready = httpx.get(f"{url}/readyz")
        assert (ready.status_code, ready.json()["is_ready"]) == (503, False)
        host, port = addresses["grpc_address"].split(":")
        socket.create_connection((host, int(port))).close()
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait(timeout=20) == 0


@pytest.mark.parametrize("api", ["grpc", "http"])
def test_a_port_in_use_is_one_line_and_exit_code_2(tmp_path: Path, model_dir: Path, api: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with process(spec_file(tmp_path, model_dir, **{f"{api}_port": port})) as child:
            _, stderr = child.communicate(timeout=60)
    assert child.returncode == 2
    lines = [line for line in stderr.splitlines() if not line.startswith(("E0000", "I0000", "WARNING: All log"))]
    assert len(lines) == 1
    assert str(port) in lines[0]
    assert "in use" in lines[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": "red"}, "colour: unknown key"),
        ({"grpc_port": "many"}, "grpc_port: must be a valid integer, not the text 'many'"),
        ({"grpc_port": 70000}, "grpc_port: must be at most 65535, not 70000"),
        ({"config": {"window": 3}}, "config.window: unknown key"),
        ({"config": {"window_tokens": True}}, "config.window_tokens: must be a valid integer, not true"),
        ({"config": {"window_tokens": 0}}, "config.window_tokens: must be at least 1"),
        ({"config": {"policy": "best"}}, "config.policy: must be one of cheapest"),
        ({"model_dir": "nowhere"}, "nowhere: no such model directory"),
        ({"control": "carrier-pigeon://"}, "control: must be"),
    ],
)
def test_a_bad_spec_is_one_line_and_exit_code_2(
    tmp_path: Path, model_dir: Path, changes: dict[str, object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from router.__main__ import main

    assert main(["--spec", str(spec_file(tmp_path, model_dir, **changes))]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_a_spec_that_is_missing_or_no_json_says_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        load(RouterSpec, tmp_path / "nothing.json")
    (tmp_path / "spec.json").write_text("{")
    with pytest.raises(SettingsError, match="not JSON"):
        load(RouterSpec, tmp_path / "spec.json")
    (tmp_path / "spec.json").write_text("{}")
    with pytest.raises(SettingsError, match="router_id: missing"):
        load(RouterSpec, tmp_path / "spec.json")


def test_a_spec_comes_back_as_it_was_written(tmp_path: Path) -> None:
    spec = RouterSpec("r", "m", "n", "memory://x", config=RouterConfig(window_tokens=8, drain_s=3))
    write(tmp_path / "spec.json", spec)
    assert load(RouterSpec, tmp_path / "spec.json") == spec


def test_epochs_grow_even_when_the_clock_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.app.time.time_ns", lambda: 5_000_000_000)
    next_epoch = _epochs()
    assert [next_epoch() for _ in range(3)] == [5000, 5001, 5002]


async def test_it_finds_its_workers_through_a_node_process_and_drains(
    tmp_path: Path, model_dir: Path, kv_node: KVNode
) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.step_s = 0.01
    await worker.start()
    directory = await asyncio.to_thread(open_directory, kv_node.control_url, "")
    record = WorkerRecord("mixed-0", worker.address, "mixed", "mixed", node_id="node-0")
    await asyncio.to_thread(directory.keep_alive, record, 60.0)
    config = dataclasses.asdict(RouterConfig(new_request_wait_s=30.0))
    with process(spec_file(tmp_path, model_dir, control=kv_node.control_url, config=config)) as child:
        assert child.stdout is not None
        target = json.loads(await asyncio.to_thread(child.stdout.readline))["grpc_address"]
        answer = asyncio.create_task(collect(target, request(max_tokens=60)))
        await until(lambda: worker.num_sent >= 5, "it streams")
        os.kill(child.pid, signal.SIGTERM)
        assert (await answer)[1] == expected_tokens(PROMPT, 60)
        assert await asyncio.to_thread(child.wait, 20) == 0
    directory.close()
    await worker.kill()


async def test_what_does_not_end_in_time_is_cancelled_when_the_router_stops(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.prefill_s = 60.0
    async with running_cluster(model_dir, worker, config=config_with(drain_s=0.1)) as cluster:
        answer = asyncio.create_task(collect(cluster.grpc_address, request(), resume_within_s=0))
        await until(lambda: worker.num_live == 1, "it runs")
        stopping = asyncio.create_task(cluster.router.stop())
        with pytest.raises(GenerationError, match=r"UNAVAILABLE|CANCELLED"):
            await answer
        await stopping
        await until(lambda: worker.num_live == 0, "the worker got the cancel")


async def test_http_clients_that_are_cut_when_the_router_stops_get_to_know_why(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.step_s = 0.05
    config = config_with(drain_s=0.3)
    async with running_cluster(model_dir, worker, config=config) as cluster, httpx.AsyncClient(timeout=20) as client:
        body = {"model": "", "prompt": list(PROMPT), "max_tokens": 100, "ignore_eos": True}
        url = f"{cluster.http_url}/v1/completions"
        whole = asyncio.create_task(client.post(url, json=body))
        streamed = asyncio.create_task(client.post(url, json={**body, "stream": True}))
        host, port = cluster.http_url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n{")
        await until(lambda: worker.num_live == 2 and worker.num_sent > 2, "both run")
        await cluster.router.stop()

        refused = await whole
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "stopping"
        assert refused.headers["retry-after"] == "1"
        *_, last = (line for line in (await streamed).text.splitlines() if line)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
        unread = (await reader.read()).decode()
        assert unread.startswith("HTTP/1.1 503 ")
        assert '"code":"stopping"' in unread
        writer.close()
