"""Each way to keep keys and values, in whole engines: close to the exact one, and the same in any company."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.quant.served import FIXTURES, MODELS, oracle
from tests.workers.engine_group import EngineGroup
from tests.workers.model.test_family_plugin import CONFIG, PLUGINS, make_random
from tests.workers.runtime.test_batch_invariance import GREEDY, SAMPLED, assert_same, many_prompts, pick
from tests.workers.tiny_llama import make_checkpoint, with_kv_channels
from workers.config import EngineConfig

DEMO = Path(__file__).parents[3] / "models" / "demo"
LOSSY = ("int8", "fp8", "kivi4", "kivi2", "kivi8_4", "token4", "wkv4")
LARGEST_CHANGE = {  # relative; the tiny models have large weights
    "int8": 0.02, "fp8": 0.15, "kivi4": 0.2, "kivi2": 1.0, "kivi8_4": 0.2, "token4": 0.3, "wkv4": 0.3,
}  # fmt: skip
# One that rounds each token, and one that packs blocks of them. The others share their code and run in the slow lane.
ON_SPLITS = [name if name in ("int8", "kivi4") else pytest.param(name, marks=pytest.mark.slow) for name in LOSSY]
EXACT = {"kv_window_tokens": 6, "kv_sink_tokens": 5}  # few, so that most of a short prompt is packed


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("tiny")
    return {shape: with_kv_channels(make_checkpoint(shape, directory)) for shape in ("gqa", "head_dim", "qwen3")}


@pytest.fixture(scope="module")
def alone() -> Iterator[EngineGroup]:
    with EngineGroup(1, 1) as group:
        yield group


@pytest.fixture(scope="module", params=[(1, 1), (2, 1), (1, 2)], ids=lambda p: f"tp{p[0]}pp{p[1]}")
def group(request):
    with EngineGroup(*request.param) as group:
        yield group


def demo_prompts() -> list[list[int]]:
    return [[5 + (i * 37 + j * j) % 3000 for j in range(n)] for i, n in enumerate((40, 3, 75))]


def change(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("kv_cache_dtype", LOSSY)
@pytest.mark.parametrize("model", ["demo", "gqa", "qwen3"])
def test_first_logits_are_near_those_of_the_exact_cache(alone, checkpoints, kv_cache_dtype: str, model: str) -> None:
    """Of prompts in chunks: all but a prompt's last chunk is read from the cache only."""
    path = DEMO if model == "demo" else checkpoints[model]
    prompts = demo_prompts() if model == "demo" else many_prompts()
    config = EngineConfig(str(path), "float32", "cpu", block_size=4, num_blocks=128, max_num_batched_tokens=16)
    exact, found = (
        alone.run(replace(config, kv_cache_dtype=name, **EXACT), prompts, GREEDY) for name in ("auto", kv_cache_dtype)
    )
    changes = [change(a[0], b[0]) for a, b in zip(found.logits, exact.logits, strict=True)]
    assert 1e-4 < max(changes) < LARGEST_CHANGE[kv_cache_dtype]


@pytest.mark.parametrize("kv_cache_dtype", ON_SPLITS)
def test_logits_have_the_same_bits_whatever_happens_around_a_request(group, checkpoints, kv_cache_dtype: str) -> None:
    """In chunks of any length, in any company, preempted, after a prefix hit, padded to capture sizes."""
    plain = EngineConfig(
        str(checkpoints["gqa"]), "float32", "cpu", tp=group.tp, pp=group.pp, block_size=4, num_blocks=256,
        max_num_batched_tokens=16, batch_invariant=True, enable_prefix_caching=False, kv_cache_dtype=kv_cache_dtype,
        max_model_len=44,  # windows of 128 then fit into few blocks
        **EXACT,
    )  # fmt: skip
    whole = many_prompts()
    expected = group.run(plain, whole, SAMPLED)
    for i in (0, 2):
        if group.pp == 1:
            assert_same(group.run(plain, [whole[i]], SAMPLED), pick(expected, [i]), f"request {i} alone")
    for chunk in (7, 512):
        assert_same(group.run(replace(plain, max_num_batched_tokens=chunk), whole, SAMPLED), expected, f"{chunk}")
    for caching in (False, True):
        found = group.run(replace(plain, num_blocks=18, enable_prefix_caching=caching), whole, SAMPLED)
        assert found.num_preemptions > 0
        assert_same(found, expected, f"preempted, caching={caching}")
    cached = group.run(replace(plain, enable_prefix_caching=True), whole, SAMPLED)
    assert cached.num_cached_prompt_tokens > 0
    assert_same(cached, expected, "prefixes from the cache")
    assert_same(group.run(replace(plain, cuda_graphs=True), whole, SAMPLED), expected, "padded to the capture sizes")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_cache_dtype", ON_SPLITS)
def test_tokens_do_not_depend_on_how_the_model_is_split(
    alone, group, checkpoints, kv_cache_dtype: str, dtype: str
) -> None:
    """Where sums are the same: with pipeline stages always, with other ranks as far as fp32 rounds alike."""
    if dtype == "bfloat16" and group.tp > 1:
        pytest.skip("two ranks add in another order, and bf16 rounds that into other tokens")
    config = EngineConfig(str(checkpoints["gqa"]), dtype, "cpu", num_blocks=64, kv_cache_dtype=kv_cache_dtype, **EXACT)
    expected = alone.run(config, many_prompts(), GREEDY).completions
    assert group.run(replace(config, tp=group.tp, pp=group.pp), many_prompts(), GREEDY).completions == expected


@pytest.mark.parametrize("kv_cache_dtype", LOSSY)
def test_decode_attention_reads_them_as_well(alone, checkpoints, kv_cache_dtype: str) -> None:
    """Decode attention, which that mode does not use: one token at a time, over sequences of several lengths."""
    config = EngineConfig(str(checkpoints["head_dim"]), "float32", "cpu", block_size=4, num_blocks=256)
    exact, found = (
        alone.run(replace(config, kv_cache_dtype=name, **EXACT), many_prompts(), GREEDY)
        for name in ("auto", kv_cache_dtype)
    )
    for mine, theirs, a, b in zip(found.logits, exact.logits, found.completions, exact.completions, strict=True):
        num_same = next((i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), len(a) - 1)
        for i in range(num_same + 1):  # of equal histories
            assert change(mine[i], theirs[i]) < 2 * LARGEST_CHANGE[kv_cache_dtype]


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "kivi4"])
def test_layers_with_a_window_of_their_own(alone, tmp_path: Path, kv_cache_dtype: str) -> None:
    """Every other layer sees 6 tokens, of which 4 are exact here, and the 2 before them packed."""
    path = make_random(tmp_path, CONFIG)
    config = EngineConfig(
        str(path), "float32", "cpu", block_size=4, num_blocks=64, max_num_batched_tokens=16, batch_invariant=True,
        plugins=PLUGINS, kv_window_tokens=4, kv_sink_tokens=5,
    )  # fmt: skip
    exact = alone.run(config, many_prompts(), GREEDY)
    found = alone.run(replace(config, kv_cache_dtype=kv_cache_dtype), many_prompts(), GREEDY)
    for other in ({"max_num_batched_tokens": 7}, {"num_blocks": 18}):
        again = alone.run(replace(config, kv_cache_dtype=kv_cache_dtype, **other), many_prompts(), GREEDY)
        assert_same(again, found, str(other))
    changes = [change(a[0], b[0]) for a, b in zip(found.logits, exact.logits, strict=True)]
    assert 1e-4 < max(changes) < LARGEST_CHANGE[kv_cache_dtype]


@pytest.mark.parametrize("name", [name for name in ("ct-fp8-kv",) if name in MODELS])
def test_logits_of_a_checkpoint_with_a_calibrated_fp8_cache_are_the_oracles(alone, name: str) -> None:
    """llm-compressor's scales; its own model rounds keys and values, too."""
    said = oracle(name)
    token_ids, expected = said["token_ids"].flatten().tolist(), said["logits"].flatten(0, -2)
    prompts = [token_ids[: len(token_ids) - i] for i in reversed(range(len(expected)))]
    config = EngineConfig(str(FIXTURES / name), "float32", "cpu", num_blocks=64)
    exact, fp8 = (alone.run(replace(config, kv_cache_dtype=kind), prompts, GREEDY) for kind in ("auto", "fp8"))
    assert max(change(a[0], b) for a, b in zip(fp8.logits, expected, strict=True)) < 1e-5
    assert min(change(a[0], b) for a, b in zip(exact.logits, expected, strict=True)) > 0.01
