"""Checkpoints that other tools quantized: the matrices and logits are theirs, and tokens do not depend on the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.quant.served import FIXTURES, MODELS, ROUNDS_INPUTS, dequantized, last_logits, oracle
from tests.workers.engine_group import EngineGroup
from workers.config import EngineConfig
from workers.errors import ModelError
from workers.model.registry import load_config
from workers.model.tensor_layout import check_checkpoint, check_split
from workers.sampling.params import SamplingParams

pytestmark = pytest.mark.timeout(300)

# Largest relative difference from the oracle's logits, in fp32. These random models amplify what is rounded otherwise.
LOOSE, VERY_LOOSE, EXACT = 0.1, 0.35, 5e-3
REFUSED = {"ct-w4a16-k96": "tp=2 does not divide num_attention_heads=3"}  # on two ranks

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.mark.parametrize("name", MODELS)
def test_matrices_are_the_oracles(name: str) -> None:
    """Bit for bit, in the dtype in which the oracle has them."""
    said = {key.removeprefix("dequantized."): value for key, value in oracle(name).items() if "dequantized." in key}
    assert said or name == "ct-fp8-kv"  # its cache alone is quantized
    for matrix, expected in said.items():
        found = dequantized(FIXTURES / name, matrix, (expected.shape[0], expected.shape[1]))
        if name == "bnb-int8":  # it multiplies in another order
            torch.testing.assert_close(found, expected.float(), rtol=2e-7, atol=0)
        else:
            assert torch.equal(found.to(expected.dtype), expected)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_oracles(name: str) -> None:
    said = oracle(name)
    check_checkpoint(FIXTURES / name, load_config(FIXTURES / name))
    expected = said["logits"].flatten(0, -2)
    found = last_logits(FIXTURES / name, torch.float32, said["token_ids"].flatten(), len(expected))
    allowed = VERY_LOOSE if name == "ct-nvfp4-a4" else LOOSE if name in ROUNDS_INPUTS else EXACT
    assert ((found - expected).norm() / expected.norm()).item() < allowed


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_takes_other_products(name: str) -> None:
    """Packed ones where there are any: one row and several, beside fp32."""
    token_ids = oracle(name)["token_ids"].flatten()
    for length in (1, len(token_ids)):
        expected = last_logits(FIXTURES / name, torch.float32, token_ids[:length], 1)
        found = last_logits(FIXTURES / name, torch.bfloat16, token_ids[:length], 1)
        assert ((found - expected).norm() / expected.norm()).item() < LOOSE


def config_of(name: str) -> EngineConfig:
    return EngineConfig(str(FIXTURES / name), "float32", "cpu", block_size=4, num_blocks=64, max_num_batched_tokens=12)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(128, (length,), generator=generator).tolist() for length in (5, 19)]


@pytest.fixture(scope="module")
def alone() -> Iterator[EngineGroup]:
    with EngineGroup(1, 1) as group:
        yield group


@pytest.fixture(scope="module", params=[(2, 1), (1, 2)], ids=["tp2", "pp2"])
def several(request: pytest.FixtureRequest) -> Iterator[EngineGroup]:
    with EngineGroup(*request.param) as group:
        yield group


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_one_rank(name: str, alone: EngineGroup, several: EngineGroup) -> None:
    expected = alone.run(config_of(name), prompts(), GREEDY)
    if several.tp > 1 and name in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[name]):
            check_split(load_config(FIXTURES / name), several.tp, several.pp)
        return
    check_split(load_config(FIXTURES / name), several.tp, several.pp)
    config = replace(config_of(name), tp=several.tp, pp=several.pp)
    found = several.run(config, prompts(), GREEDY)
    # Where inputs are rounded row by row, each rank rounds its share of a row by its own scale.
    count = 1 if several.tp > 1 and name in ROUNDS_INPUTS else GREEDY.max_tokens
    assert [tokens[:count] for tokens in found.completions] == [tokens[:count] for tokens in expected.completions]
