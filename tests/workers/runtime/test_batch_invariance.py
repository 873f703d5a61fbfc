"""In batch-invariant mode a request's logits have the same bits, whatever happens around it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.workers.engine_group import EngineGroup, JobResult
from tests.workers.tiny_llama import make_checkpoint, prompts
from workers.config import EngineConfig
from workers.sampling.params import SamplingParams

MAX_TOKENS = 10
CASES = [("gqa", "float32"), ("head_dim", "bfloat16")]
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, top_k=30, seed=5, max_tokens=MAX_TOKENS, ignore_eos=True)


def many_prompts() -> list[list[int]]:
    """The usual three, and more of other lengths: two sizes of batch differ by more than a row."""
    generator = torch.Generator().manual_seed(3)
    return prompts() + [torch.randint(97, (n,), generator=generator).tolist() for n in (1, 31, 17)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("tiny")
    return {shape: make_checkpoint(shape, directory) for shape, _ in CASES}


@pytest.fixture(scope="module", params=[1, 2], ids=lambda tp: f"tp{tp}")
def group(request):
    with EngineGroup(request.param, 1) as group:
        yield group


def assert_same(found: JobResult, expected: JobResult, why: str) -> None:
    assert found.completions == expected.completions, why
    for mine, theirs in zip(found.logits, expected.logits, strict=True):
        assert torch.equal(mine, theirs), f"{why}: off by up to {(mine - theirs).abs().max():.3g}"


def pick(result: JobResult, indices: list[int]) -> JobResult:
    return JobResult([result.completions[i] for i in indices], 0, 0, 0, [result.logits[i] for i in indices])


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_logits_are_equal_alone_and_in_any_company(group, checkpoints, shape, dtype):
    plain = EngineConfig(
        str(checkpoints[shape]), dtype, "cpu", tp=group.tp, block_size=4, num_blocks=256, max_num_batched_tokens=16,
        batch_invariant=True, enable_prefix_caching=False,
    )  # fmt: skip
    whole = many_prompts()
    alone = [group.run(plain, [p], GREEDY) for p in whole]
    expected = JobResult([r.completions[0] for r in alone], 0, 0, 0, [r.logits[0] for r in alone])
    for chunk in (7, 16, 512):
        found = group.run(replace(plain, max_num_batched_tokens=chunk), whole, GREEDY)
        assert_same(found, expected, f"all of them, chunks of {chunk}")
    for indices in ([4, 1, 3], [2, 1, 0]):
        assert_same(
            group.run(plain, [whole[i] for i in indices], GREEDY), pick(expected, indices), f"requests {indices}"
        )
    for caching in (False, True):
        found = group.run(replace(plain, num_blocks=18, enable_prefix_caching=caching), whole, GREEDY)
        assert found.num_preemptions > 0
        assert_same(found, expected, f"preempted, caching={caching}")
    cached = group.run(replace(plain, enable_prefix_caching=True), whole, GREEDY)
    assert cached.num_cached_prompt_tokens > 0
    assert_same(cached, expected, "prefixes from the cache")
    assert_same(group.run(replace(plain, cuda_graphs=True), whole, GREEDY), expected, "padded to the capture sizes")


def test_sampled_tokens_are_equal_alone_and_in_any_company(group, checkpoints):
    plain = EngineConfig(
        str(checkpoints["gqa"]), "bfloat16", "cpu", tp=group.tp, block_size=4, num_blocks=256, batch_invariant=True
    )
    whole = many_prompts()
    together = group.run(plain, whole, SAMPLED)
    for i in (0, 2, 5):
        assert_same(group.run(plain, [whole[i]], SAMPLED), pick(together, [i]), f"request {i} alone")
    preempted = group.run(replace(plain, num_blocks=18, max_num_batched_tokens=7), whole, SAMPLED)
    assert preempted.num_preemptions > 0
    assert_same(preempted, together, "preempted")


def test_without_the_mode_bits_depend_on_the_company(group, checkpoints):
    """Or the test above would prove nothing."""
    config = EngineConfig(str(checkpoints["gqa"]), "float32", "cpu", tp=group.tp, block_size=4, num_blocks=256)
    whole = many_prompts()
    together = group.run(config, whole, GREEDY)
    alone = [group.run(config, [p], GREEDY) for p in whole]
    assert not all(torch.equal(t, a.logits[0]) for t, a in zip(together.logits, alone, strict=True))
