"""Greedy tokens equal transformers' `generate`, for the full product of splits, caching, chunking and memory."""

import itertools
from pathlib import Path

import pytest

from tests.workers.engine_group import EngineGroup
from tests.workers.tiny_llama import SHAPES, generate_with_transformers, make_checkpoint, prompts
from workers.config import EngineConfig
from workers.sampling.params import SamplingParams

MAX_TOKENS = 12
DEMO = Path(__file__).parents[3] / "models" / "demo"
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("tiny")
    return {shape: make_checkpoint(shape, directory) for shape in SHAPES}


@pytest.fixture(scope="module")
def expected(checkpoints) -> dict[str, list[list[int]]]:
    return {
        shape: [generate_with_transformers(path, p, MAX_TOKENS) for p in prompts()]
        for shape, path in checkpoints.items()
    }


SPLITS = {(tp, pp): f"tp{tp}pp{pp}" for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2))}
# Two cores take long for several ranks: the other shapes run there in the slow lane.
ON_RANKS = {1: SHAPES, 2: ("gqa", "qwen3_experts", "head_dim", "tied"), 4: ("gqa", "qwen3_experts")}


@pytest.fixture(scope="module", params=SPLITS, ids=SPLITS.values())
def group(request):
    with EngineGroup(*request.param) as group:
        yield group


def config_for(path: Path, group: EngineGroup, **options) -> EngineConfig:
    return EngineConfig(str(path), tp=group.tp, pp=group.pp, device="cpu", dtype="float32", **options)


@pytest.mark.parametrize(
    ("group", "shape"),
    [
        pytest.param(
            split, shape, id=f"{name}-{shape}",
            marks=[pytest.mark.slow] * (shape not in ON_RANKS[split[0] * split[1]]),
        )
        for split, name in SPLITS.items()
        for shape in SHAPES
    ],
    indirect=["group"],
)  # fmt: skip
def test_tokens_are_equal(group, shape, checkpoints, expected):
    for caching, chunk, num_blocks in itertools.product((True, False), (7, 512), (13, 64)):
        config = config_for(
            checkpoints[shape], group, block_size=4, num_blocks=num_blocks, max_num_batched_tokens=chunk,
            enable_prefix_caching=caching,
        )  # fmt: skip
        result = group.run(config, prompts(), GREEDY)
        assert result.completions == expected[shape], f"caching={caching} chunk={chunk} num_blocks={num_blocks}"
        assert (result.num_preemptions > 0) == (num_blocks == 13), "few blocks preempt, many do not"
        if not caching:
            assert result.num_cached_prompt_tokens == 0
        elif chunk == 7:  # the second request has computed the shared prefix before the third is admitted
            assert result.num_cached_prompt_tokens > 0


def test_demo_model_is_equal(group):
    token_ids = [[5 + (i * 37 + j * j) % 3000 for j in range(n)] for i, n in enumerate((40, 3, 75))]
    config = config_for(DEMO, group, block_size=16, num_blocks=64, max_num_batched_tokens=33)
    result = group.run(config, token_ids, GREEDY)
    assert result.completions == [generate_with_transformers(DEMO, ids, MAX_TOKENS) for ids in token_ids]


def test_sampled_tokens_do_not_depend_on_the_split(group, checkpoints):
    """The same seed gives the same tokens whatever tp, pp and the batch around it are."""
    sampling = SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=11, max_tokens=MAX_TOKENS, ignore_eos=True)
    plain = SamplingParams(temperature=1.1, seed=2**40 + 1, max_tokens=MAX_TOKENS, ignore_eos=True)
    config = config_for(checkpoints["gqa"], group, block_size=4, num_blocks=64)
    with EngineGroup(1, 1) as alone:
        for params in (sampling, plain):
            one_by_one = [
                alone.run(config_for(checkpoints["gqa"], alone, block_size=4, num_blocks=64), [p], params).completions[
                    0
                ]
                for p in prompts()
            ]
            assert group.run(config, prompts(), params).completions == one_by_one
