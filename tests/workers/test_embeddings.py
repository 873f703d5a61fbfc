"""Embeddings in the engine against transformers: alone, beside streams, in chunks, preempted, cached, split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from tests.workers.engine_group import EngineGroup, JobResult, run_job
from tests.workers.test_sampling_options import ALONE, config_for, options, prompt
from tests.workers.tiny_llama import make_checkpoint, write_tokenizer
from workers.engine.request import Pooling
from workers.sampling.params import SamplingParams

NUMBERS = range(24)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint("gqa", tmp_path_factory.mktemp("tiny"))
    write_tokenizer(path / "tokenizer.json")
    return path


def wanted(number: int) -> SamplingParams | Pooling:
    return (Pooling.LAST, Pooling.MEAN, options(number))[number % 3]


def token_ids(number: int) -> list[int]:
    return [*prompt(number), *prompt(number + 5)][: 1 + 2 * number]


def job() -> tuple[list[list[int]], list[SamplingParams | Pooling]]:
    return [token_ids(number) for number in NUMBERS], [wanted(number) for number in NUMBERS]


@pytest.fixture(scope="module")
def streams(checkpoint: Path) -> list[list[int]]:
    """The completions of those that are no embeddings, without any embedding beside them."""
    numbers = [number for number in NUMBERS if isinstance(wanted(number), SamplingParams)]
    result = run_job(config_for(checkpoint), ALONE, [token_ids(n) for n in numbers], [options(n) for n in numbers])
    assert result is not None
    return result.completions


def check(checkpoint: Path, result: JobResult | None, streams: list[list[int]]) -> None:
    assert result is not None
    assert [completion for completion in result.completions if completion] == streams
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    for number in NUMBERS:
        pooling, found = wanted(number), result.embeddings[number]
        if isinstance(pooling, SamplingParams):
            assert found == ()
            continue
        with torch.inference_mode():
            hidden = model(torch.tensor([token_ids(number)])).last_hidden_state[0]
        expected = hidden[-1] if pooling is Pooling.LAST else hidden.mean(dim=0)
        torch.testing.assert_close(torch.tensor(found), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_batched_tokens": 9},
        {"async_scheduling": True, "num_blocks": 40, "max_num_seqs": 8},
        {"num_blocks": 24, "max_num_seqs": 6},
        {"batch_invariant": True},
    ],
)
def test_embeddings_are_those_of_transformers(
    checkpoint: Path, streams: list[list[int]], changes: dict[str, object]
) -> None:
    if changes.get("batch_invariant"):
        streams = [c for c in run(checkpoint, batch_invariant=True, enable_prefix_caching=False).completions if c]
    result = run_job(config_for(checkpoint, **changes), ALONE, *job())
    check(checkpoint, result, streams)


def run(checkpoint: Path, **changes: object) -> JobResult:
    result = run_job(config_for(checkpoint, **changes), ALONE, *job())
    assert result is not None
    return result


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_any_split_gives_them(checkpoint: Path, streams: list[list[int]], tp: int, pp: int) -> None:
    with EngineGroup(tp, pp) as group:
        check(checkpoint, group.run(config_for(checkpoint, tp=tp, pp=pp), *job()), streams)


def test_a_cached_prefix_serves_the_last_token_and_not_the_mean(checkpoint: Path) -> None:
    ids = token_ids(11)
    poolings = [Pooling.LAST, Pooling.LAST, Pooling.MEAN]
    result = run_job(config_for(checkpoint, max_num_seqs=1), ALONE, [ids] * 3, poolings)
    assert result is not None
    torch.testing.assert_close(torch.tensor(result.embeddings[0]), torch.tensor(result.embeddings[1]))
    assert result.num_cached_prompt_tokens > 0
    assert result.num_computed_prompt_tokens == 3 * len(ids) - result.num_cached_prompt_tokens
