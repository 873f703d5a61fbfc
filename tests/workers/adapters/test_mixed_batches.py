"""Requests with other adapters, or none, do not touch each other: neither in a step, nor over the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers.engine_group import EngineGroup, JobResult
from tests.workers.speculation.scripted import Scripted
from tests.workers.tiny_llama import prompts
from workers.config import EngineConfig
from workers.engine.adapters.ref import AdapterRef
from workers.sampling.params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def config_of(base: Path, group: EngineGroup, **options: Any) -> EngineConfig:
    given = {"dtype": "float32", "tp": group.tp, "block_size": 4, "num_blocks": 128, "max_num_batched_tokens": 16}
    return EngineConfig(str(base), device="cpu", enable_lora=True, **{**given, **options})


def mixed(adapters: list[AdapterRef]) -> tuple[list[list[int]], list[AdapterRef | None]]:
    """Eight requests; some share a prompt, some an adapter, some have none."""
    first, second, third = prompts()
    a, b, c, d, _, f = adapters
    return (
        [first, first, second, third, second, first, third, second],
        [a, None, b, c, d, a, None, f],
    )


def alone(group: EngineGroup, config: EngineConfig, asked: tuple[Any, Any]) -> list[JobResult]:
    return [group.run(config, [prompt], GREEDY, [adapter]) for prompt, adapter in zip(*asked, strict=True)]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_bits_are_those_of_a_request_alone(
    split: EngineGroup, base: Path, adapters: list[AdapterRef], dtype: str
) -> None:
    config = config_of(base, split, dtype=dtype, batch_invariant=True)
    asked = mixed(adapters)
    expected = alone(split, config, asked)
    assert len({tuple(result.completions[0]) for result in expected}) > 4, "adapters change what is chosen"
    found = {
        "together": split.run(config, asked[0], GREEDY, asked[1]),
        "chunks of 5": split.run(replace(config, max_num_batched_tokens=5), asked[0], GREEDY, asked[1]),
        "two slots": split.run(replace(config, max_loras=2), asked[0], GREEDY, asked[1]),
        "preempted": split.run(replace(config, num_blocks=18), asked[0], GREEDY, asked[1]),
        "padded": split.run(replace(config, cuda_graphs=True), asked[0], GREEDY, asked[1]),
    }
    assert found["preempted"].num_preemptions > 0
    for why, result in found.items():
        for i, one in enumerate(expected):
            assert result.completions[i] == one.completions[0], f"{why}: request {i}"
            assert torch.equal(result.logits[i], one.logits[0]), f"{why}: request {i}"


@pytest.mark.parametrize(
    "rule",
    [pytest.param("perfect", marks=pytest.mark.slow), "often_right", pytest.param("wrong", marks=pytest.mark.slow)],
)
def test_drafts_change_no_token(split: EngineGroup, base: Path, adapters: list[AdapterRef], rule: str) -> None:
    config = config_of(base, split, batch_invariant=True)
    asked, sampled = mixed(adapters), replace(GREEDY, temperature=0.9, max_tokens=12)
    plain = split.run(config, asked[0], sampled, asked[1])
    drafter = Scripted(rule, {f"r{i}": completion for i, completion in enumerate(plain.completions)}, 97)
    for options in ({}, {"max_loras": 2}):
        found = split.run(replace(config, **options), asked[0], sampled, asked[1], drafter)
        assert found.completions == plain.completions
        assert found.speculation is not None
        assert (found.speculation.num_accepted_tokens > 0) == (rule != "wrong")


def test_without_adapters_the_bits_are_those_of_an_engine_that_takes_none(
    split: EngineGroup, base: Path, adapters: list[AdapterRef]
) -> None:
    config = config_of(base, split, batch_invariant=True)
    plain = split.run(replace(config, enable_lora=False), prompts(), GREEDY)
    beside = split.run(config, [*prompts(), *prompts()], GREEDY, [None] * 3 + adapters[:3])
    assert beside.completions[:3] == plain.completions
    for found, expected in zip(beside.logits[:3], plain.logits, strict=True):
        assert torch.equal(found, expected)


def test_blocks_are_shared_within_an_adapter_only(
    single: EngineGroup, base: Path, folder: Path, adapters: list[AdapterRef]
) -> None:
    """One request at a time, so that each could find what the ones before it left."""
    config = config_of(base, single, max_num_seqs=1, batch_invariant=True)
    prompt = prompts()[1]  # 23 tokens: five full blocks
    order = [None, adapters[0], adapters[1], None, adapters[0]]
    found = single.run(config, [prompt] * len(order), GREEDY, order)
    cached = [end.num_cached_prompt_tokens for end in found.ends]
    assert cached == [0, 0, 0, 20, 20]
    assert found.completions[3] == found.completions[0]
    assert found.completions[4] == found.completions[1]
    assert torch.equal(found.logits[4], found.logits[1])
    assert found.completions[1] != found.completions[0] != found.completions[2]


@pytest.mark.parametrize("num_slots", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_more_adapters_than_slots_take_turns(
    split: EngineGroup, base: Path, adapters: list[AdapterRef], num_slots: int
) -> None:
    """Twelve requests of six adapters; host memory holds one adapter more than the device."""
    asked = [prompts()[i % 3] for i in range(12)]
    wanted = [adapters[i % 6] for i in range(12)]
    whole = split.run(config_of(base, split), asked, GREEDY, wanted)
    assert whole.adapter_counts[1:] == (6, 6)
    config = config_of(base, split, max_loras=num_slots, max_cpu_loras=num_slots + 1)
    found = split.run(config, asked, GREEDY, wanted)
    assert found.completions == whole.completions
    hits, copies, reads = found.adapter_counts
    assert copies >= reads >= 6
    assert hits + copies >= 12


@pytest.mark.parametrize("options", [{"async_scheduling": True}, {"cuda_graphs": True}, {"max_num_seqs": 2}])
def test_however_steps_are_run(
    split: EngineGroup, base: Path, adapters: list[AdapterRef], options: dict[str, Any]
) -> None:
    asked = mixed(adapters)
    plain = split.run(config_of(base, split, max_loras=3), *asked[:1], GREEDY, asked[1])
    found = split.run(config_of(base, split, max_loras=3, **options), *asked[:1], GREEDY, asked[1])
    assert found.completions == plain.completions
