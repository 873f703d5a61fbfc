"""Prefill on one worker, decode on another, KV blocks through a real KV node: each prompt token is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from switchyard.v1 import worker_pb2

from kvstore.config import KVStoreConfig
from kvstore.connect import open_directory
from kvstore.names import block_names, root_name
from tests.workers.forked_worker import ALWAYS, BLOCK_SIZE, prompt, spec_for, worker
from tests.workers.tiny_llama import generate_with_transformers, make_checkpoint
from tests.workers.worker_client import WorkerClient, disaggregate, wait_until

pytestmark = pytest.mark.xdist_group("disaggregation")  # its fixtures are processes, made once

LENGTHS = (1, 15, 16, 17, 48, 77)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint("gqa", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def prefill(checkpoint, shared_kv_node) -> Iterator[WorkerClient]:
    with worker(spec_for(checkpoint, "prefill", shared_kv_node)) as client:
        yield client


@pytest.fixture(scope="module")
def decode(checkpoint, shared_kv_node) -> Iterator[WorkerClient]:
    with worker(spec_for(checkpoint, "decode", shared_kv_node)) as client:
        yield client


@pytest.fixture(scope="module")
def mixed(checkpoint, shared_kv_node) -> Iterator[WorkerClient]:
    with worker(spec_for(checkpoint, "mixed", shared_kv_node)) as client:
        yield client


def test_each_prompt_token_is_computed_once(checkpoint, prefill, decode):
    before, computed_before = decode.load(), prefill.load().num_computed_prompt_tokens
    for length in LENGTHS:
        token_ids = prompt(length)
        tokens, prefilled, decoded = disaggregate(prefill, decode, token_ids)
        assert tokens == generate_with_transformers(checkpoint, token_ids, 8)
        assert prefilled.outcome == worker_pb2.REQUEST_OUTCOME_PREFILLED
        assert prefilled.num_computed_prompt_tokens == length
        assert decoded.num_computed_prompt_tokens == 0
        assert decoded.num_transferred_blocks == -(-length // BLOCK_SIZE)
        assert 0 < prefilled.times.first_step_s < prefilled.times.first_token_s < decoded.times.continued_s
        assert decoded.times.continued_s < decoded.times.first_step_s < decoded.times.first_token_s
        assert prefilled.times.continued_s == 0
    load = decode.load()
    assert load.num_recomputed_prompt_tokens == before.num_recomputed_prompt_tokens
    num_blocks = sum(-(-n // BLOCK_SIZE) for n in LENGTHS)
    assert load.num_transferred_blocks - before.num_transferred_blocks == num_blocks
    assert load.pulled_bytes["host"] > before.pulled_bytes["host"]
    assert prefill.load().num_computed_prompt_tokens - computed_before == sum(LENGTHS)


def test_second_time_prefill_computes_the_tail_and_decode_pulls_the_tail_only(checkpoint, prefill, decode):
    token_ids = prompt(40, seed=1)
    first, _, _ = disaggregate(prefill, decode, token_ids)
    again, prefilled, decoded = disaggregate(prefill, decode, token_ids)
    assert again == first
    assert (prefilled.num_cached_prompt_tokens, prefilled.num_computed_prompt_tokens) == (32, 8)
    assert (decoded.num_transferred_blocks, decoded.num_computed_prompt_tokens) == (1, 0)
    whole, prefilled, decoded = disaggregate(prefill, decode, token_ids[:32])
    assert whole == generate_with_transformers(checkpoint, token_ids[:32], 8)
    assert (prefilled.num_cached_prompt_tokens, prefilled.num_computed_prompt_tokens) == (31, 1)
    assert (decoded.num_transferred_blocks, decoded.num_computed_prompt_tokens) == (0, 0)


def test_what_decode_computed_is_found_by_the_next_turn_and_by_a_failover(checkpoint, shared_kv_node, prefill, decode):
    token_ids = prompt(21, seed=7)
    tokens, _, _ = disaggregate(prefill, decode, token_ids, max_tokens=60)
    history = [*token_ids, *tokens]
    expected = generate_with_transformers(checkpoint, history, 8)
    with worker(spec_for(checkpoint, "mixed", shared_kv_node, kvstore=ALWAYS)) as other:
        names = block_names(root_name(other.kv_fingerprint(), b""), history[:80], BLOCK_SIZE, with_tail=False)
        directory = open_directory(shared_kv_node.control_url, "")
        wait_until(lambda: all(directory.locate(names)))  # they are written back beside the steps
        directory.close()
        other.submit("next", history, worker_pb2.REQUEST_ROLE_MIXED)
        finished = other.wait_finished("next")
        assert other.tokens["next"] == expected
        assert finished.num_transferred_blocks == 5
        assert (finished.num_cached_prompt_tokens, finished.num_computed_prompt_tokens) == (80, 1)
        assert other.load().num_prefixes_fetched == 1


def test_a_flipped_byte_is_counted_and_recomputed(checkpoint, shared_kv_node, prefill, decode):
    token_ids = prompt(77, seed=2)
    before = decode.load()
    prefill.submit("flip", token_ids, worker_pb2.REQUEST_ROLE_PREFILL)
    prefill.wait_finished("flip")
    flip_stored_bytes(Path(shared_kv_node.arena))
    decode.submit("flip", token_ids, worker_pb2.REQUEST_ROLE_DECODE)
    decode.continue_stream("flip", prefill.tokens["flip"])
    decoded = decode.wait_finished("flip")
    assert prefill.tokens["flip"] + decode.tokens["flip"] == generate_with_transformers(checkpoint, token_ids, 8)
    assert decoded.num_computed_prompt_tokens > 0
    load = decode.load()
    recomputed = load.num_recomputed_prompt_tokens - before.num_recomputed_prompt_tokens
    assert recomputed == decoded.num_computed_prompt_tokens
    assert load.num_rejected_fragments["checksum"] > before.num_rejected_fragments["checksum"]


def flip_stored_bytes(arena: Path) -> None:
    """Change a byte in every used page of the arena, as bad memory cells would."""
    data = bytearray(arena.read_bytes())
    used = [i for i in range(0, len(data), 1024) if any(data[i + 128 : i + 1024])]
    for page in used:
        index = next(i for i in range(page + 128, page + 1024) if data[i])
        data[index] ^= 0x10
    with arena.open("r+b") as file:
        file.write(data)


def test_decode_goes_on_alone_when_prefill_is_lost(checkpoint, decode):
    token_ids = prompt(50, seed=3)
    decode.submit("lost", token_ids, worker_pb2.REQUEST_ROLE_DECODE)
    decode.continue_stream("lost", [])
    decoded = decode.wait_finished("lost")
    assert decode.tokens["lost"] == generate_with_transformers(checkpoint, token_ids, 8)
    assert decoded.num_computed_prompt_tokens == len(token_ids)


def test_decode_goes_on_alone_when_the_node_is_killed(checkpoint, kv_node):
    token_ids = prompt(60)
    with (
        worker(spec_for(checkpoint, "prefill", kv_node)) as prefill,
        worker(spec_for(checkpoint, "decode", kv_node)) as decode,
    ):
        disaggregate(prefill, decode, prompt(33))
        kv_node.kill()
        tokens, _, decoded = disaggregate(prefill, decode, token_ids)
        assert tokens == generate_with_transformers(checkpoint, token_ids, 8)
        assert decoded.num_computed_prompt_tokens == len(token_ids)
        assert not decode.load().tier_is_up["host"]


def test_redis_alone_carries_the_blocks(checkpoint, kv_node, redis_server):
    options = {"host_address": "", "kvstore": KVStoreConfig(tier=redis_server.url), "tier_secret": "of the tests"}
    options["control"] = redis_server.url
    with (
        worker(spec_for(checkpoint, "prefill", kv_node, **options)) as prefill,
        worker(spec_for(checkpoint, "decode", kv_node, **options)) as decode,
    ):
        tokens, _, decoded = disaggregate(prefill, decode, prompt(50))
        assert tokens == generate_with_transformers(checkpoint, prompt(50), 8)
        assert (decoded.num_transferred_blocks, decoded.num_computed_prompt_tokens) == (4, 0)
        assert decode.load().pulled_bytes["redis"] > 0
        redis_server.kill()
        tokens, _, decoded = disaggregate(prefill, decode, prompt(51))
        assert tokens == generate_with_transformers(checkpoint, prompt(51), 8)
        assert not decode.load().tier_is_up["redis"]


@pytest.mark.parametrize("split", [("2x1", "1x2"), ("1x1", "2x1")], ids=lambda s: f"prefill{s[0]}-decode{s[1]}")
def test_prefill_and_decode_may_be_split_differently(checkpoint, kv_node, split):
    (ptp, ppp), (dtp, dpp) = (map(int, s.split("x")) for s in split)
    with (
        worker(spec_for(checkpoint, "prefill", kv_node, tp=ptp, pp=ppp)) as prefill,
        worker(spec_for(checkpoint, "decode", kv_node, tp=dtp, pp=dpp)) as decode,
    ):
        for length in (5, 32, 70):
            tokens, _, decoded = disaggregate(prefill, decode, prompt(length))
            assert tokens == generate_with_transformers(checkpoint, prompt(length), 8)
            assert decoded.num_computed_prompt_tokens == 0


def test_cancel_frees_the_blocks_within_a_second(mixed):
    free = mixed.load().num_free_blocks
    mixed.submit("cancel", prompt(20), worker_pb2.REQUEST_ROLE_MIXED, max_tokens=100)
    wait_until(lambda: len(mixed.tokens["cancel"]) > 2)
    mixed.send(cancel=worker_pb2.Cancel(stream_id="cancel"))
    assert mixed.wait_finished("cancel", 1.0).outcome == worker_pb2.REQUEST_OUTCOME_CANCELLED
    wait_until(lambda: mixed.load().num_free_blocks == free, 1.0)


def test_a_lost_router_connection_ends_its_requests(mixed):
    with WorkerClient(mixed.address, "other") as other:
        other.submit("s", prompt(20), worker_pb2.REQUEST_ROLE_MIXED, max_tokens=100, window_tokens=3)
        wait_until(lambda: len(other.tokens["s"]) == 3)
        assert mixed.load().num_running == 1
    wait_until(lambda: mixed.load().num_running == 0, 10)


def test_a_full_window_stops_the_stream_until_credit_comes(checkpoint, mixed):
    mixed.submit("slow", prompt(20), worker_pb2.REQUEST_ROLE_MIXED, max_tokens=10, window_tokens=4)
    mixed.submit("quick", prompt(21), worker_pb2.REQUEST_ROLE_MIXED, max_tokens=30)
    mixed.wait_finished("quick")
    assert len(mixed.tokens["slow"]) == 4
    mixed.send(credit=worker_pb2.Credit(stream_id="slow", num_tokens=64))
    mixed.wait_finished("slow")
    assert mixed.tokens["slow"] == generate_with_transformers(checkpoint, prompt(20), 10)


def test_a_request_past_its_deadline_ends(decode):
    decode.submit("late", prompt(20, seed=4), worker_pb2.REQUEST_ROLE_DECODE, deadline_s=0.2)
    assert decode.wait_finished("late", 10).outcome == worker_pb2.REQUEST_OUTCOME_CANCELLED


@pytest.mark.parametrize(
    ("token_ids", "options", "field"),
    [
        ([97], {}, "token_ids"),
        (list(range(50)) * 3, {}, "token_ids"),
        ([1, 2], {"num_prompt_tokens": 0}, "num_prompt_tokens"),
        ([1, 2], {"num_prompt_tokens": 3}, "num_prompt_tokens"),
        ([1, 2], {"role": 0}, "role"),
        ([1, 2], {"max_tokens": 0}, "sampling.max_tokens"),
    ],
)
def test_bad_requests_are_refused_and_name_the_field(mixed, token_ids, options, field):
    stream_id = f"bad-{field}-{len(token_ids)}-{sorted(options.items())}"
    options = dict(options)
    mixed.submit(stream_id, token_ids, options.pop("role", worker_pb2.REQUEST_ROLE_MIXED), **options)
    finished = mixed.wait_finished(stream_id)
    assert finished.outcome == worker_pb2.REQUEST_OUTCOME_FAILED
    assert finished.is_invalid_request
    assert finished.error.startswith(field)
    mixed.submit(f"good-{stream_id}", [1, 2], worker_pb2.REQUEST_ROLE_MIXED)
    assert mixed.wait_finished(f"good-{stream_id}").outcome == worker_pb2.REQUEST_OUTCOME_LENGTH
