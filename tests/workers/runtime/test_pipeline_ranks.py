"""A pipeline of real ranks: the tokens are those of one rank, and no stage waits while there is work for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.workers.engine_group import EngineGroup, JobResult, Sampling
from tests.workers.stage_events import run_stages
from tests.workers.tiny_llama import make_checkpoint
from workers.config import EngineConfig
from workers.sampling.params import SamplingParams

pytestmark = pytest.mark.xdist_group("pipeline ranks")  # its fixtures are processes, made once


def prompts() -> list[list[int]]:
    """Nine of several lengths, of which some begin alike."""
    generator = torch.Generator().manual_seed(4)
    shared = torch.randint(97, (13,), generator=generator).tolist()
    own = [torch.randint(97, (n,), generator=generator).tolist() for n in (9, 1, 30, 5, 17, 2, 8, 40, 3)]
    return [shared + tail if i % 3 else tail for i, tail in enumerate(own)]


_RULES = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "min_tokens": 3, "stop_token_ids": frozenset(range(9))}
SAMPLINGS: dict[str, Sampling] = {
    "greedy": SamplingParams(max_tokens=12, ignore_eos=True),
    "sampled": SamplingParams(1.2, 0.9, seed=3, max_tokens=12, stop_token_ids=frozenset(range(20))),
    "mixed": [
        SamplingParams(0.8 * (i % 2), 0.95, seed=i, max_tokens=4 + 2 * i, logprobs=2 if i % 3 == 0 else None)
        if i % 2
        else SamplingParams(0.9, seed=i, max_tokens=14, **_RULES)
        for i in range(9)
    ],
}
CASES = {  # blocks, tokens of a step, graphs
    "ample": (96, 512, False),
    "chunks": (64, 7, True),
    "preempted": (22, 16, False),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("gqa", tmp_path_factory.mktemp("pipeline"))


def config_for(checkpoint: Path, case: str) -> EngineConfig:
    num_blocks, chunk, graphs = CASES[case]
    return EngineConfig(
        str(checkpoint), "float32", "cpu", block_size=4, num_blocks=num_blocks,
        max_num_batched_tokens=chunk, max_num_seqs=8, cuda_graphs=graphs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[tuple[str, str], JobResult]:
    with EngineGroup(1, 1) as group:
        return {
            (case, name): group.run(config_for(checkpoint, case), prompts(), sampling)
            for case in CASES
            for name, sampling in SAMPLINGS.items()
        }


@pytest.fixture(scope="module", params=[(1, 2), (2, 2), (1, 3)], ids=lambda s: f"tp{s[0]}pp{s[1]}")
def group(request: pytest.FixtureRequest) -> Iterator[EngineGroup]:
    with EngineGroup(*request.param) as made:
        yield made


@pytest.mark.parametrize(
    ("group", "is_async"),
    [
        pytest.param((1, 2), False, id="tp1pp2-waiting"),
        pytest.param((1, 2), True, id="tp1pp2-async", marks=pytest.mark.slow),
        pytest.param((2, 2), False, id="tp2pp2-waiting"),  # async is refused there
        pytest.param((1, 3), False, id="tp1pp3-waiting", marks=pytest.mark.slow),
        pytest.param((1, 3), True, id="tp1pp3-async"),
    ],
    indirect=["group"],
)
def test_the_tokens_are_those_of_one_rank(checkpoint, expected, group, is_async):
    for case in CASES:
        config = replace(config_for(checkpoint, case), tp=group.tp, pp=group.pp, async_scheduling=is_async)
        for name, sampling in SAMPLINGS.items():
            found, wanted = group.run(config, prompts(), sampling), expected[case, name]
            assert found.completions == wanted.completions, (case, name)
            assert [[bool(p) for p in ps] for ps in found.logprobs] == [[bool(p) for p in ps] for ps in wanted.logprobs]
            for ours, theirs in zip(found.logprobs, wanted.logprobs, strict=True):
                for mine, other in zip(ours, theirs, strict=True):
                    assert mine is None or mine.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert (found.num_preemptions > 0) == (case == "preempted")
        assert found.num_cached_prompt_tokens > 0


@pytest.mark.parametrize("is_async", [False, True], ids=["waiting", "async"])
@pytest.mark.parametrize("num_stages", [2, 3])
def test_all_stages_are_at_work_at_the_same_time(checkpoint, num_stages, is_async):
    """Prompts in chunks first, then decodes; a stage was idle while another one computed."""
    config = replace(config_for(checkpoint, "ample"), pp=num_stages, async_scheduling=is_async)
    config = replace(config, max_num_batched_tokens=64, num_blocks=160)
    first, last = 2 * num_stages, 50
    events = run_stages(config, (first, last))
    assert not events.has_missed.value
    for sequence in range(first + num_stages, last):
        begins = [events.begin(stage, sequence - stage) for stage in range(num_stages)]
        ends = [events.end(stage, sequence - stage) for stage in range(num_stages)]
        assert max(begins) < min(ends), f"stages 0 .. of plans {sequence} .. overlap: {begins} {ends}"
