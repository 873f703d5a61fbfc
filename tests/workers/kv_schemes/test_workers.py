"""Real workers with each way to keep keys and values: hand-off, swaps, and what must not be used. Bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from switchyard.v1 import worker_pb2

from kvstore.config import KVStoreConfig
from kvstore.names import NAME_BYTES
from tests.cluster.test_fault_injection import FaultInjector, fragment_keys
from tests.processes import KVNode
from tests.workers.test_disaggregation import ALWAYS, prompt, spec_for, worker
from tests.workers.tiny_llama import make_checkpoint
from tests.workers.worker_client import WorkerClient, disaggregate, wait_until
from workers.config import WorkerSpec
from workers.kv.grid import FragmentGrid

SCHEMES = ("int8", "fp8", "kivi2", "kivi8_4")  # one of each form, and one of two forms behind the exact one
NUM_TOKENS = 30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("gqa", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=SCHEMES)
def kv_cache_dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def scheme_spec(checkpoint: Path, role: str, node: KVNode, kv_cache_dtype: str, **options: object) -> WorkerSpec:
    engine = {name: options.pop(name) for name in ("num_blocks",) if name in options}
    engine["max_model_len"] = 112  # so that windows of 128 fit into few blocks
    spec = spec_for(checkpoint, role, node, **options)
    exact = {"batch_invariant": True, "kv_cache_dtype": kv_cache_dtype, **engine}
    return replace(spec, engine=replace(spec.engine, **exact))


def undisturbed(spec: WorkerSpec, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """The tokens of a worker alone, without tiers, one request after the other."""
    alone = replace(spec, role="mixed", worker_id="alone", host_address="", control="")
    alone = replace(alone, engine=replace(alone.engine, num_blocks=64, enable_prefix_caching=False))
    with worker(alone) as client:
        return [mixed(client, f"r{i}", token_ids, max_tokens) for i, token_ids in enumerate(prompts)]


def mixed(client: WorkerClient, stream_id: str, token_ids: list[int], max_tokens: int) -> list[int]:
    client.submit(stream_id, token_ids, worker_pb2.REQUEST_ROLE_MIXED, max_tokens=max_tokens)
    client.wait_finished(stream_id)
    return client.tokens[stream_id]


def test_hand_off_and_prefix_hits_give_the_undisturbed_tokens(checkpoint, shared_kv_node, kv_cache_dtype) -> None:
    prompts = [prompt(length, seed=40) for length in (1, 16, 33, 77)]
    specs = [scheme_spec(checkpoint, role, shared_kv_node, kv_cache_dtype) for role in ("prefill", "decode")]
    right = undisturbed(specs[0], prompts, NUM_TOKENS)
    with ExitStack() as stack:
        prefill, decode = (stack.enter_context(worker(spec)) for spec in specs)
        for token_ids, expected in zip(prompts, right, strict=True):
            tokens, prefilled, decoded = disaggregate(prefill, decode, token_ids, NUM_TOKENS)
            assert tokens == expected
            assert decoded.num_computed_prompt_tokens == 0
            assert decoded.num_transferred_blocks == -(-len(token_ids) // 16)
        again, prefilled, _ = disaggregate(prefill, decode, prompts[-1], NUM_TOKENS)
        assert again == right[-1]
        assert prefilled.num_cached_prompt_tokens == 64


def test_swapped_requests_give_the_undisturbed_tokens(checkpoint, shared_kv_node, kv_cache_dtype) -> None:
    prompts = [prompt(60, seed=50), prompt(61, seed=51)]
    spec = scheme_spec(checkpoint, "mixed", shared_kv_node, kv_cache_dtype, kvstore=ALWAYS, num_blocks=9)
    right = undisturbed(spec, prompts, 50)
    for fetch in ("always", "never"):
        with worker(replace(spec, kvstore=KVStoreConfig(prefix_fetch=fetch))) as client:
            for i, token_ids in enumerate(prompts):
                client.submit(f"r{i}", token_ids, worker_pb2.REQUEST_ROLE_MIXED, max_tokens=50)
            for i in range(2):
                client.wait_finished(f"r{i}")
            assert [client.tokens[f"r{i}"] for i in range(2)] == right
            load = client.load()
            assert load.num_preemptions > 0
            assert (load.num_swaps > 0) == (fetch == "always")


def test_damaged_blocks_are_computed_again(checkpoint, shared_kv_node, kv_cache_dtype) -> None:
    """Damaged and stale ones: the kinds that tests.fault_injector knows, in turn."""
    prompts = [prompt(95, seed=60 + i) for i in range(6)]
    specs = [scheme_spec(checkpoint, role, shared_kv_node, kv_cache_dtype) for role in ("prefill", "decode")]
    grid = FragmentGrid(range(3), 1, 0, 2)
    right = undisturbed(specs[0], prompts, 8)
    num_damaged = 0
    with ExitStack() as stack:
        prefill, decode = (stack.enter_context(worker(spec)) for spec in specs)
        injector = stack.enter_context(FaultInjector.of_arena(shared_kv_node))
        for first_bad, (token_ids, expected) in enumerate(zip(prompts, right, strict=True)):
            stream_id = f"s{first_bad}"
            prefill.submit(stream_id, token_ids, worker_pb2.REQUEST_ROLE_PREFILL)
            prefill.wait_finished(stream_id)
            blocks = fragment_keys(prefill.hello.kv_fingerprint, token_ids, 16, grid)
            bad = [key for block in blocks[first_bad:] for key in block]
            assert all(key[:NAME_BYTES] == block[0][:NAME_BYTES] for block in blocks for key in block)
            assert injector.damage(bad).total() == len(bad)
            num_damaged += len(bad)
            decode.submit(stream_id, token_ids, worker_pb2.REQUEST_ROLE_DECODE)
            decode.continue_stream(stream_id, prefill.tokens[stream_id])
            assert decode.wait_finished(stream_id).num_transferred_blocks == first_bad
            assert prefill.tokens[stream_id] + decode.tokens[stream_id] == expected
        assert sum(decode.load().num_rejected_fragments.values()) == num_damaged


def test_blocks_of_other_schemes_are_not_used(checkpoint, shared_kv_node, kv_cache_dtype) -> None:
    """Neither an exact worker takes any, nor this one an exact worker's."""
    own, exact = (
        replace(scheme_spec(checkpoint, "mixed", shared_kv_node, name, kvstore=ALWAYS), worker_id=f"mixed-{name}")
        for name in (kv_cache_dtype, "auto")
    )
    first = 100 + 2 * SCHEMES.index(kv_cache_dtype)  # the exact worker's blocks of other tests stay in the node
    for seed, writing, reading in ((first, own, exact), (first + 1, exact, own)):
        token_ids = prompt(77, seed=seed)
        (right,) = undisturbed(reading, [token_ids], 8)
        with worker(writing) as writer, worker(reading) as reader:
            assert writer.hello.kv_fingerprint != reader.hello.kv_fingerprint
            mixed(writer, "w", token_ids, 8)
            assert mixed(reader, "r", token_ids, 8) == right
            assert reader.load().num_transferred_blocks == 0


def test_late_blocks_are_not_waited_for(checkpoint, shared_kv_node, kv_cache_dtype) -> None:
    """Prefill says that it is through before the tiers have anything: what comes later is not used."""
    token_ids = prompt(77, seed=80)
    specs = [scheme_spec(checkpoint, role, shared_kv_node, kv_cache_dtype) for role in ("prefill", "decode")]
    right = undisturbed(specs[0], [token_ids], 8)[0]
    with worker(specs[0]) as prefill, worker(specs[1]) as decode:
        decode.submit("late", token_ids, worker_pb2.REQUEST_ROLE_DECODE)
        decode.continue_stream("late", [])
        prefill.submit("late", token_ids, worker_pb2.REQUEST_ROLE_PREFILL)
        decode.wait_finished("late")
        assert decode.tokens["late"] == right


def test_a_stream_goes_on_elsewhere_when_its_worker_is_killed(checkpoint, shared_kv_node, kv_cache_dtype) -> None:
    """As a router places it again: with what was sent as the prompt, on a worker that finds the blocks in the tier."""
    token_ids = prompt(40, seed=90)
    spec = scheme_spec(checkpoint, "mixed", shared_kv_node, kv_cache_dtype, kvstore=ALWAYS)
    right = undisturbed(spec, [token_ids], 60)[0]
    with worker(replace(spec, worker_id="mixed-1")) as other:
        process, address = start(spec)
        with WorkerClient(address) as dying:
            dying.submit("s", token_ids, worker_pb2.REQUEST_ROLE_MIXED, max_tokens=60, window_tokens=30)
            wait_until(lambda: len(dying.tokens["s"]) >= 30)
            process.send_signal(signal.SIGKILL)
            process.wait(30)
            sent = dying.tokens["s"]
        other.submit(
            "s", token_ids + sent, worker_pb2.REQUEST_ROLE_MIXED, max_tokens=60, num_prompt_tokens=len(token_ids)
        )
        finished = other.wait_finished("s")
        assert sent + other.tokens["s"] == right
        assert finished.num_transferred_blocks >= 3


def start(spec: WorkerSpec) -> tuple[subprocess.Popen[str], str]:
    """A worker that the test kills itself: its process, and its address."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(asdict(spec), file)
        file.flush()
        command = [sys.executable, "-m", "workers", "--spec", file.name]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, json.loads(process.stdout.readline())["address"]
