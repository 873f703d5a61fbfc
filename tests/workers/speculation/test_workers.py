"""Drafts on real workers: after a hand-off, and after a prefix hit, as many are accepted as on one worker.

The draft is the model itself, so that every one of its tokens is right where it has read the whole context. A head has
not seen what was computed elsewhere; its tokens are the right ones all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from switchyard.v1 import generation_pb2, worker_pb2

from tests.workers.forked_worker import prompt, spec_for, worker
from tests.workers.speculation.tiny_eagle import make_head
from tests.workers.tiny_llama import generate_with_transformers, make_checkpoint
from tests.workers.worker_client import WorkerClient, disaggregate
from workers.config import SpeculativeOptions, WorkerSpec

pytestmark = pytest.mark.xdist_group("speculation workers")  # its fixtures are processes, made once

NUM_TOKENS = 24
LENGTHS = (7, 16, 45)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("gqa", tmp_path_factory.mktemp("tiny"))


def drafting(spec: WorkerSpec, method: str = "draft_model", model: str = "") -> WorkerSpec:
    options = SpeculativeOptions(
        method=method,
        model=model or spec.engine.model_dir,
        enable_adaptive_verification=False,
        num_speculative_tokens=4,
        draft_model_lookup_min=0,
    )
    return replace(spec, engine=replace(spec.engine, speculative=options))


@pytest.fixture(scope="module")
def workers(checkpoint: Path, shared_kv_node) -> Iterator[dict[str, WorkerClient]]:
    with (
        worker(spec_for(checkpoint, "prefill", shared_kv_node)) as prefill,
        worker(drafting(spec_for(checkpoint, "decode", shared_kv_node))) as decode,
        worker(drafting(spec_for(checkpoint, "mixed", shared_kv_node))) as mixed,
    ):
        yield {"prefill": prefill, "decode": decode, "mixed": mixed}


def alone(client: WorkerClient, name: str, token_ids: list[int], **sampling: int) -> worker_pb2.RequestFinished:
    options = generation_pb2.SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, seed=1, **sampling)
    client.submit(name, token_ids, worker_pb2.REQUEST_ROLE_MIXED, NUM_TOKENS, sampling=options)
    return client.wait_finished(name)


@pytest.mark.parametrize("length", LENGTHS)
def test_drafts_are_accepted_after_a_hand_off_and_a_prefix_hit(
    workers: dict[str, WorkerClient], checkpoint: Path, length: int
) -> None:
    token_ids = prompt(length, seed=3)
    expected = generate_with_transformers(checkpoint, token_ids, NUM_TOKENS)
    whole = alone(workers["mixed"], f"first-{length}", token_ids)
    assert workers["mixed"].tokens[f"first-{length}"] == expected
    assert whole.num_accepted_tokens == whole.num_draft_tokens >= NUM_TOKENS * 2 // 3
    again = alone(workers["mixed"], f"again-{length}", token_ids)
    assert workers["mixed"].tokens[f"again-{length}"] == expected
    assert again.num_accepted_tokens == again.num_draft_tokens >= whole.num_draft_tokens  # the draft's prefix is there
    tokens, prefilled, decoded = disaggregate(workers["prefill"], workers["decode"], token_ids, NUM_TOKENS)
    assert tokens == expected
    assert prefilled.num_draft_tokens == 0
    assert decoded.num_computed_prompt_tokens == 0
    assert decoded.num_accepted_tokens == decoded.num_draft_tokens >= NUM_TOKENS * 2 // 3 - 1


def test_a_request_may_have_fewer_drafts_or_none(workers: dict[str, WorkerClient]) -> None:
    token_ids = prompt(20, seed=4)
    none = alone(workers["mixed"], "none", token_ids, num_speculative_tokens=0)
    one = alone(workers["mixed"], "one", token_ids, num_speculative_tokens=1)
    assert none.num_draft_tokens == 0
    assert 0 < one.num_draft_tokens <= NUM_TOKENS // 2
    assert workers["mixed"].tokens["none"] == workers["mixed"].tokens["one"]


def test_a_worker_reports_what_became_of_drafts(workers: dict[str, WorkerClient]) -> None:
    alone(workers["mixed"], "counted", prompt(20, seed=5))
    load = workers["mixed"].load()
    assert load.num_drafts > 0
    assert 0 < load.num_accepted_tokens <= load.num_draft_tokens
    assert sum(load.num_accepted_tokens_per_pos.values()) == load.num_accepted_tokens
    assert load.num_accepted_tokens_per_pos["0"] >= load.num_accepted_tokens_per_pos["3"]
    assert load.drafting_seconds > 0


@pytest.fixture(scope="module")
def with_head(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, shared_kv_node) -> Iterator[WorkerClient]:
    head = str(make_head(tmp_path_factory.mktemp("head")))
    with worker(drafting(spec_for(checkpoint, "mixed", shared_kv_node), "eagle3", head)) as mixed:
        yield mixed


@pytest.mark.parametrize("length", LENGTHS)
def test_a_head_after_a_prefix_hit_and_a_hand_off(
    workers: dict[str, WorkerClient], with_head: WorkerClient, checkpoint: Path, length: int
) -> None:
    token_ids = prompt(length, seed=6)
    expected = generate_with_transformers(checkpoint, token_ids, NUM_TOKENS)
    for turn in range(2):
        ended = alone(with_head, f"head-{length}-{turn}", token_ids)
        assert with_head.tokens[f"head-{length}-{turn}"] == expected
        assert ended.num_draft_tokens >= NUM_TOKENS
        assert (ended.num_cached_prompt_tokens > 0) == (turn > 0 and length >= 16)
    handed = prompt(length, seed=7)
    expected = generate_with_transformers(checkpoint, handed, NUM_TOKENS)
    tokens, _, decoded = disaggregate(workers["prefill"], with_head, handed, NUM_TOKENS)
    assert tokens == expected
    assert decoded.num_computed_prompt_tokens == 0
    assert decoded.num_draft_tokens >= NUM_TOKENS
