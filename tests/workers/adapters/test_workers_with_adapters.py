"""Whole workers over gRPC: disaggregated, with reports of what is where, typed errors, and the fake engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from switchyard.v1 import adapter_pb2, worker_pb2

from tests.peft_adapters import load_adapted, load_base
from tests.processes import KVNode
from tests.workers.adapters.test_matches_peft import last_logits
from tests.workers.forked_worker import prompt, spec_for, worker
from tests.workers.worker_client import WorkerClient, wait_until
from workers.config import WorkerSpec
from workers.engine.adapters.ref import AdapterRef
from workers.runtime.fake.model import fake_completion

pytestmark = pytest.mark.xdist_group("workers with adapters")  # its fixtures are processes, made once

MIXED = worker_pb2.REQUEST_ROLE_MIXED


def wire(ref: AdapterRef) -> adapter_pb2.Adapter:
    return adapter_pb2.Adapter(name=ref.name, digest=ref.digest, path=ref.path)


def with_lora(spec: WorkerSpec, **options: object) -> WorkerSpec:
    return replace(spec, engine=replace(spec.engine, enable_lora=True, **options))


@pytest.fixture(scope="module")
def prefill(base: Path, shared_kv_node: KVNode) -> Iterator[WorkerClient]:
    with worker(with_lora(spec_for(base, "prefill", shared_kv_node))) as client:
        yield client


@pytest.fixture(scope="module")
def decode(base: Path, shared_kv_node: KVNode) -> Iterator[WorkerClient]:
    with worker(with_lora(spec_for(base, "decode", shared_kv_node, tp=2))) as client:
        yield client


def disaggregated(
    prefill: WorkerClient, decode: WorkerClient, name: str, token_ids: list[int], ref: AdapterRef | None
) -> tuple[list[int], worker_pb2.RequestFinished, worker_pb2.RequestFinished]:
    options = {} if ref is None else {"adapter": wire(ref)}
    decode.submit(name, token_ids, worker_pb2.REQUEST_ROLE_DECODE, **options)
    prefill.submit(name, token_ids, worker_pb2.REQUEST_ROLE_PREFILL, **options)
    prefilled = prefill.wait_finished(name)
    decode.continue_stream(name, prefill.tokens[name])
    decoded = decode.wait_finished(name)
    return prefill.tokens[name] + decode.tokens[name], prefilled, decoded


def test_disaggregated_requests_are_those_of_peft_and_share_no_blocks(
    base: Path, adapters: list[AdapterRef], prefill: WorkerClient, decode: WorkerClient
) -> None:
    token_ids = prompt(40)
    found = {}
    for ref in (adapters[0], adapters[1], None):
        name = "base" if ref is None else ref.name
        tokens, prefilled, decoded = disaggregated(prefill, decode, name, token_ids, ref)
        assert prefilled.num_computed_prompt_tokens == 40, "nothing of another adapter's is used"
        assert (decoded.num_transferred_blocks, decoded.num_computed_prompt_tokens) == (3, 0)
        model = load_base(base) if ref is None else load_adapted(base, Path(ref.path))
        assert tokens == last_logits(model, token_ids, tokens).argmax(dim=1).tolist()
        found[name] = tokens
    assert len(set(map(tuple, found.values()))) == 3
    again, prefilled, _ = disaggregated(prefill, decode, "again", token_ids, adapters[0])
    assert again == found["a0"]
    assert prefilled.num_cached_prompt_tokens == 32


def test_a_worker_says_which_adapters_it_has(adapters: list[AdapterRef], base: Path, shared_kv_node: KVNode) -> None:
    spec = with_lora(spec_for(base, "mixed", shared_kv_node), max_loras=2, max_cpu_loras=3)
    with worker(spec) as client:
        for i, ref in enumerate([*adapters[:4], adapters[3]]):
            client.submit(f"s{i}", prompt(9), MIXED, adapter=wire(ref))
            client.wait_finished(f"s{i}")
        wait_until(lambda: client.load().num_running == 0)
        load = client.load()
        assert load.num_adapter_slots == 2
        assert list(load.device_adapters) == [adapters[3].digest, adapters[2].digest]
        assert list(load.host_adapters) == [adapters[1].digest]
        assert (load.num_adapter_hits, load.num_adapter_copies, load.num_adapter_reads) == (1, 4, 4)
        assert (load.num_failed_adapters, load.num_waiting_for_adapter) == (0, 0)
        client.send(pin_adapters=worker_pb2_pins([adapters[0]]))
        wait_until(lambda: adapters[0].digest in client.load().device_adapters)
        for i, ref in enumerate([*adapters[1:6], adapters[0]]):
            client.submit(f"p{i}", prompt(9), MIXED, adapter=wire(ref))
            client.wait_finished(f"p{i}")
        wait_until(lambda: client.load().num_running == 0)
        assert client.load().num_adapter_hits == 2, "the pinned adapter stayed"


def worker_pb2_pins(refs: list[AdapterRef]) -> adapter_pb2.PinAdapters:
    return adapter_pb2.PinAdapters(adapters=map(wire, refs))


def test_errors_are_typed(adapters: list[AdapterRef], prefill: WorkerClient, tmp_path: Path) -> None:
    gone = AdapterRef("gone", b"\1" * 32, str(tmp_path / "gone"))
    prefill.submit("gone", prompt(9), MIXED, adapter=wire(gone))
    prefill.submit("good", prompt(9), MIXED, adapter=wire(adapters[0]))
    end = prefill.wait_finished("gone")
    assert (end.outcome, end.is_invalid_request) == (worker_pb2.REQUEST_OUTCOME_ADAPTER_FAILED, False)
    assert end.error == f"{gone.path}: no such directory"
    assert prefill.wait_finished("good").outcome == worker_pb2.REQUEST_OUTCOME_LENGTH
    prefill.submit("digest", prompt(9), MIXED, adapter=adapter_pb2.Adapter(digest=b"short", path=gone.path))
    end = prefill.wait_finished("digest")
    assert (end.outcome, end.is_invalid_request) == (worker_pb2.REQUEST_OUTCOME_FAILED, True)
    assert end.error == "adapter.digest: has 5 bytes, not 32"


def test_a_worker_without_adapters_refuses_them(base: Path, adapters: list[AdapterRef], shared_kv_node: KVNode) -> None:
    with worker(spec_for(base, "mixed", shared_kv_node)) as client:
        client.submit("s", prompt(9), MIXED, adapter=wire(adapters[0]))
        end = client.wait_finished("s")
        assert (end.outcome, end.is_invalid_request) == (worker_pb2.REQUEST_OUTCOME_FAILED, True)
        assert end.error == "adapter: this worker takes none (enable_lora is off)"
        assert client.load().num_adapter_slots == 0


def test_the_fake_engine_serves_adapters(base: Path, adapters: list[AdapterRef], shared_kv_node: KVNode) -> None:
    """Its tokens depend on the adapter; KV of another one gives wrong tokens."""
    spec = with_lora(spec_for(base, "mixed", shared_kv_node), runner="fake", max_loras=2)
    with worker(spec) as client:
        wanted: list[AdapterRef | None] = [adapters[0], adapters[1], None, adapters[2], adapters[0], None]
        for i, ref in enumerate(wanted):
            client.submit(f"s{i}", prompt(40), MIXED, **({} if ref is None else {"adapter": wire(ref)}))
        for i, ref in enumerate(wanted):
            client.wait_finished(f"s{i}")
            digest = b"" if ref is None else ref.digest
            assert client.tokens[f"s{i}"] == fake_completion(prompt(40), 8, 97, adapter_digest=digest)


def test_an_adapter_that_hangs_delays_only_its_own_requests(
    base: Path, adapters: list[AdapterRef], shared_kv_node: KVNode, make_pipe: Callable[[], Path]
) -> None:
    """A file that never ends to be read: its request ends after the time-out, others are served meanwhile."""
    hanging = make_pipe()
    spec = with_lora(spec_for(base, "mixed", shared_kv_node), lora_load_timeout_s=2.0)
    with worker(spec) as client:
        client.submit("hangs", prompt(9), MIXED, adapter=wire(AdapterRef("hangs", b"\3" * 32, str(hanging))))
        for i in range(3):
            client.submit(f"s{i}", prompt(9), MIXED, adapter=wire(adapters[i]))
            assert client.wait_finished(f"s{i}").outcome == worker_pb2.REQUEST_OUTCOME_LENGTH
        end = client.wait_finished("hangs")
        assert end.outcome == worker_pb2.REQUEST_OUTCOME_ADAPTER_FAILED
        assert end.error == f"{hanging}: the adapter was not read within 2 s"


@pytest.fixture
def make_pipe(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """An adapter's directory whose config is a pipe that nobody writes to until the test is over."""

    def make() -> Path:
        os.mkfifo(tmp_path / "adapter_config.json")
        return tmp_path

    yield make
    with open(os.open(tmp_path / "adapter_config.json", os.O_RDWR | os.O_NONBLOCK), "wb"):
        pass
