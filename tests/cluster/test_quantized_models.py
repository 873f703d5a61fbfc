"""Checkpoints that other tools quantized, one of each format: a whole cluster gives the greedy tokens of one engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Tokenizer, models

from checkpoint.gguf.directory import open_gguf
from tests.checkpoint.gguf.gguf_files import demo_tokenizer, quantised, stored_tensors, weights_of, write_gguf
from tests.fake_cluster import FakeCluster
from tests.quant.served import FIXTURES, ROUNDS_INPUTS
from tests.workers.engine_group import EngineGroup
from workers.config import EngineConfig
from workers.sampling.params import SamplingParams

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

FORMATS = (
    *("awq-gemm", "bnb-int8", "bnb-nf4", "bnb-nf4-double"),
    *("ct-fp8-block", "ct-fp8-dynamic", "ct-fp8-kv", "ct-fp8-static", "ct-mixed", "ct-moe-w4a16", "ct-mxfp4"),
    *("ct-nvfp4", "ct-w4a16-actorder", "ct-w4a16-asym", "ct-w4a8", "ct-w8a16", "ct-w8a8"),
    *("fp8-deepseek", "fp8-deepseek-moe", "gptq-8bit", "gptq-actorder", "gptq-v1", "gptq-v2"),
    *("modelopt-fp8", "modelopt-int8-sq", "gguf"),
)
MAX_TOKENS = 12
OPTIONS = {"num_blocks": 64, "max_num_batched_tokens": 32}  # of all engines


@pytest.fixture(scope="module")
def alone() -> Iterator[EngineGroup]:
    with EngineGroup(1, 1) as group:
        yield group


def _model(name: str, directory: Path) -> tuple[Path, int]:
    """A directory with tokenizer, and the number of tokens that are used."""
    if name == "gguf":
        weights = weights_of("llama", len(demo_tokenizer()["ggml.tokens"]))
        kinds = [gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0]
        tensors = quantised(stored_tensors("llama", {key: 4 * array for key, array in weights.items()}), kinds)
        return open_gguf(write_gguf(directory.with_suffix(".gguf"), "llama", tensors)), 4000
    shutil.copytree(FIXTURES / name, directory)
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, "w0")).save(str(directory / "tokenizer.json"))
    return directory, 128


@pytest.mark.parametrize("name", FORMATS)
def test_greedy_tokens_are_one_engines(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alone: EngineGroup,
    fake_cluster: Callable[..., FakeCluster],
) -> None:
    """Prefilled on two ranks, decoded by two stages."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, num_tokens = _model(name, tmp_path / "model")
    random = torch.Generator().manual_seed(3)
    prompts = [torch.randint(num_tokens, (length,), generator=random).tolist() for length in (5, 19, 70)]
    greedy = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    expected = alone.run(EngineConfig(str(model), "float32", "cpu", block_size=16, **OPTIONS), prompts, greedy)

    # Where inputs are rounded row by row, each tensor-parallel rank rounds its share of a row by a scale of its own.
    prefill = {"pp": 2} if name in ROUNDS_INPUTS else {"tp": 2}
    cluster = fake_cluster(
        prefill=1,
        decode=1,
        routers=1,
        block_size=16,
        model_dir=str(model),
        engine={"runner": "torch", **OPTIONS},
        engine_of={"prefill": prefill, "decode": {"pp": 2}},
    )
    for prompt, tokens in zip(prompts, expected.completions, strict=True):
        answer = cluster.ask(cluster.client(), prompt, MAX_TOKENS)
        assert answer.ids == tokens
        assert answer.finished is not None
        assert answer.finished.stats.num_recomputed_prompt_tokens == 0
