"""The draft model's cache: what it holds is what a fresh one would compute."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from kvstore.blocks.block_pool import BlockPool
from kvstore.blocks.block_pools import BlockPools
from tests.workers.tiny_llama import make_checkpoint
from workers.config import EngineConfig, SpeculativeOptions
from workers.engine.request import Request
from workers.runtime.drafting.build import load_draft
from workers.sampling.params import SamplingParams
from workers.speculation.drafters.draft_model import DraftModel
from workers.speculation.drafters.drafter import DraftWanted
from workers.speculation.drafters.sequences import DraftSequences

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("gqa", tmp_path_factory.mktemp("tiny"))


def draft_of(checkpoint: Path, **options: object) -> DraftModel:
    speculative = SpeculativeOptions(
        method="draft_model", model=str(checkpoint), enable_adaptive_verification=False, **options
    )
    config = EngineConfig(
        str(checkpoint), "float32", "cpu", block_size=4, num_blocks=64, max_num_seqs=3, max_num_batched_tokens=16,
        speculative=speculative,
    )  # fmt: skip
    draft = load_draft(config, CPU)
    assert draft is not None
    return draft


def request(name: str, token_ids: list[int], **sampling: object) -> Request:
    return Request(name, list(token_ids), len(token_ids), SamplingParams(**{"max_tokens": 100, **sampling}))


def proposed(draft: DraftModel, requests: list[Request], num_tokens: int = 3) -> list[list[int]]:
    for _ in range(20):  # long prompts are read in several steps
        found = draft.propose([DraftWanted(one, num_tokens) for one in requests])
        if all(found):
            return [list(one) for one in found]
    raise AssertionError("the draft never proposed anything")


def test_proposals_are_those_of_a_fresh_cache_whatever_was_accepted(checkpoint: Path) -> None:
    chance, draft = random.Random(5), draft_of(checkpoint)
    live = [
        request(f"r{i}", [chance.randrange(97) for _ in range(5 + 9 * i)], temperature=0.8, seed=i) for i in range(3)
    ]
    for turn in range(25):
        found = proposed(draft, live)
        for index, (one, drafts) in enumerate(zip(live, found, strict=True)):
            fresh = draft_of(checkpoint) if turn % 8 == index else None
            if fresh is not None:
                copy = Request("copy", list(one.token_ids), one.num_prompt_tokens, one.sampling)
                assert proposed(fresh, [copy])[0][: len(drafts)] == drafts
            one.token_ids += drafts[: chance.randrange(4)] + [chance.randrange(97)] * chance.randrange(2)
        if turn % 10 == 9:  # one leaves, another comes
            draft.forget(live[0])
            live[0] = request(f"n{turn}", live[1].token_ids[:17], temperature=0.8)


def test_what_is_drafted_ahead_is_what_would_be_drafted_then(checkpoint: Path) -> None:
    """Right and wrong drafts, with and without the token that was guessed to follow them."""
    chance, draft = random.Random(7), draft_of(checkpoint)
    one = request("r", [chance.randrange(97) for _ in range(9)], temperature=0.8, seed=3)
    num_ready = 0
    for _ in range(20):
        (drafts,) = proposed(draft, [one], 2)
        draft.ahead([one], chance.randrange(1, 5))
        fresh = draft_of(checkpoint)
        copy = request("copy", [*one.token_ids, *drafts], temperature=0.8, seed=3)
        copy.num_prompt_tokens = one.num_prompt_tokens
        (guess,) = proposed(fresh, [copy], 1)
        one.token_ids += [*drafts, *guess] if chance.random() < 0.6 else [*drafts[: chance.randrange(3)], 5]
        sequence = draft._sequences.of(one, one.num_tokens, {"r"})
        assert sequence is not None
        num_ready += len(sequence.proposed)
        copy = Request("after", list(one.token_ids), one.num_prompt_tokens, one.sampling)
        (expected,) = proposed(fresh, [copy], 4)
        (found,) = proposed(draft, [one], 4)
        assert found == expected[: len(found)]
    assert num_ready > 10


def test_prefixes_are_shared_and_prompts_are_read_while_requests_wait(checkpoint: Path) -> None:
    draft = draft_of(checkpoint)
    prompt = [(3 * i * i) % 97 for i in range(40)]
    waiting = request("w", prompt)
    for _ in range(3):
        draft.prepare([waiting])
    assert draft.propose([DraftWanted(waiting, 2)])[0]  # at once: nothing is left to read
    again = request("again", prompt)
    assert draft.propose([DraftWanted(again, 2)])[0] == proposed(draft_of(checkpoint), [again], 2)[0]


def test_a_greedy_draft_of_itself_is_always_right(checkpoint: Path) -> None:
    draft = draft_of(checkpoint, draft_temperature_scale=0.0)
    one = request("r", [1, 2, 3], temperature=0.9)
    greedy = request("g", [1, 2, 3])
    assert proposed(draft, [one], 6) == proposed(draft, [greedy], 6)


def test_more_requests_than_rows_and_blocks_give_way_to_each_other() -> None:
    pools = BlockPools([BlockPool(8, 4)])
    sequences = DraftSequences(pools, b"draft", max_rows=2)
    requests = [request(f"r{i}", [i] * 12) for i in range(4)]
    for _ in range(3):
        for one in requests:
            assert sequences.of(one, 16, {one.request_id}) is not None
            pools.check()
    assert sequences.of(requests[0], 16, {"r0", "r1"}) is not None
    assert sequences.of(requests[1], 16, {"r0", "r1"}) is not None
    assert sequences.of(requests[2], 16, {"r0", "r1", "r2"}) is None  # both rows are used now
    assert sequences.of(requests[0], 36, {"r0"}) is None  # more than there is
    for one in requests:
        sequences.forget(one.request_id)
    assert pools.num_referenced == 0
