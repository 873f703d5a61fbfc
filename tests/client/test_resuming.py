"""The client's streams through the loss of their routers: the caller sees one of them, unbroken."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

from kvstore.connect import open_directory, open_journal
from kvstore.control.directory import WorkerRecord
from router.config import RouterConfig
from router.service.text import TextCodec
from tests.processes import KVNode
from tests.router.api.asking import PROMPT, collect, request
from tests.router.conftest import config_with, running_cluster, until
from tests.router.fake_worker import FakeWorker, expected_tokens
from tests.router.test_process import process, spec_file


async def killed_router(tmp_path: Path, model_dir: Path, kv_node: KVNode, kill_after: list[int]) -> None:
    """Streams through routers that are killed with SIGKILL after so many tokens, one after the other."""
    worker = FakeWorker("mixed-0", "mixed")
    await worker.start()
    directory = await asyncio.to_thread(open_directory, kv_node.control_url, "")
    await asyncio.to_thread(
        directory.keep_alive, WorkerRecord("mixed-0", worker.address, "mixed", "mixed", node_id="node-0"), 600.0
    )
    changes = {
        "control": kv_node.control_url,
        "journal": f"file://{tmp_path}/streams.journal",
        "config": dataclasses.asdict(RouterConfig(new_request_wait_s=30.0)),
    }
    with contextlib.ExitStack() as processes:

        async def start(number: int) -> tuple[object, str]:
            folder = tmp_path / str(number)
            folder.mkdir()
            child = processes.enter_context(
                process(spec_file(folder, model_dir, router_id=f"router-{number}", **changes))
            )
            assert child.stdout is not None
            line = await asyncio.to_thread(child.stdout.readline)
            return child, json.loads(line)["grpc_address"]

        stays = await start(len(kill_after))
        for number, position in enumerate(kill_after):
            child, target = await start(number)
            num_before = worker.num_sent
            worker.step_s = 0.01
            answer = asyncio.create_task(collect((target, stays[1]), request(max_tokens=64)))
            await until(lambda n=num_before, p=position: worker.num_sent - n >= p, "it is there")
            child.kill()
            _, ids, text, _ = await answer
            assert ids == expected_tokens(PROMPT, 64)
            assert text == TextCodec(model_dir / "tokenizer.json").decode(ids)
    directory.close()
    await worker.kill()


async def test_a_client_sees_one_stream_through_the_death_of_its_router(
    tmp_path: Path, model_dir: Path, kv_node: KVNode
) -> None:
    await killed_router(tmp_path, model_dir, kv_node, [1, 2, 31, 63])


@pytest.mark.slow
async def test_the_router_may_die_at_any_token(tmp_path: Path, model_dir: Path, kv_node: KVNode) -> None:
    await killed_router(tmp_path, model_dir, kv_node, list(range(64)))


async def test_a_router_that_goes_down_hands_its_streams_on(tmp_path: Path, model_dir: Path) -> None:
    journal_url = f"file://{tmp_path}/streams.journal"
    worker = FakeWorker("mixed-0", "mixed")
    worker.step_s = 0.02
    journal = open_journal(journal_url, "")
    async with (
        running_cluster(model_dir, worker, config=config_with(drain_s=0.1), journal=journal) as first,
        running_cluster(model_dir, FakeWorker("mixed-1", "mixed"), journal=open_journal(journal_url, "")) as second,
    ):
        answer = asyncio.create_task(collect((first.grpc_address, second.grpc_address), request(max_tokens=100)))
        await until(lambda: worker.num_sent >= 5, "it streams")
        await first.router.stop()
        _, ids, _, _ = await answer
        assert ids == expected_tokens(PROMPT, 100)
        assert second.workers[0].submits
