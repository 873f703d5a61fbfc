"""Logprobs in the engine against transformers: whatever is sampled, split, batched or proposed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.workers.engine_group import EngineGroup, JobResult, RecordingExecutor, RecordingRunner, run_job
from tests.workers.test_sampling_options import ALONE, KINDS, MAX_TOKENS, config_for, prompt
from tests.workers.tiny_llama import make_checkpoint, write_tokenizer
from workers.engine.request import Request
from workers.model.registry import load_config
from workers.runtime.build import make_engine
from workers.sampling.params import SamplingParams, TokenLogprobs

NUMBERS = range(10)


def options(number: int) -> SamplingParams:
    """Every third request asks for none."""
    wanted = None if number % 3 == 2 else (0, 1, 5, 20)[number % 4]
    return replace(KINDS[number % len(KINDS)], seed=number, logprobs=wanted, prompt_logprobs=of_prompt(number))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint("gqa", tmp_path_factory.mktemp("tiny"))
    write_tokenizer(path / "tokenizer.json")
    return path


def of_prompt(number: int) -> int | None:
    """Most likely tokens at each position of the prompt."""
    return (None, 0, 3)[number % 3]


def by_transformers(checkpoint: Path, token_ids: list[int], num_output_tokens: int) -> Tensor:
    """[tokens, vocab]: logprobs at the positions of the completion, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids])).logits[0, -num_output_tokens - 1 : -1]
    return torch.log_softmax(logits.double(), dim=-1)


def check(checkpoint: Path, number: int, completion: list[int], found: list[TokenLogprobs | None]) -> None:
    wanted = options(number).logprobs
    if wanted is None:
        assert found == [None] * len(completion)
        return
    logs = by_transformers(checkpoint, [*prompt(number), *completion], len(completion))
    for row, token_id, one in zip(logs, completion, found, strict=True):
        assert one is not None
        assert one.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        assert list(one.top_logprobs) == pytest.approx(row.topk(wanted).values.tolist(), abs=1e-4)
        assert [float(row[i]) for i in one.top_ids] == pytest.approx(list(one.top_logprobs), abs=1e-4)


def check_all(checkpoint: Path, result: JobResult | None) -> None:
    assert result is not None
    for number in NUMBERS:
        check(checkpoint, number, result.completions[number], result.logprobs[number])
        check_prompt(checkpoint, number, result.prompt_logprobs[number])


def check_prompt(checkpoint: Path, number: int, found: list[TokenLogprobs | None]) -> None:
    wanted, token_ids = of_prompt(number), prompt(number)
    assert found[0] is None
    if wanted is None:
        assert found == [None] * len(token_ids)
        return
    logs = by_transformers(checkpoint, token_ids, len(token_ids) - 1)
    for row, token_id, one in zip(logs, token_ids[1:], found[1:], strict=True):
        assert one is not None
        assert one.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        assert list(one.top_logprobs) == pytest.approx(row.topk(wanted).values.tolist(), abs=1e-4)
        assert [float(row[i]) for i in one.top_ids] == pytest.approx(list(one.top_logprobs), abs=1e-4)


def test_a_cached_prompt_is_computed_again_for_its_logprobs(checkpoint: Path) -> None:
    """In chunks of a few tokens, after requests that left all of its blocks in the cache."""
    config = config_for(checkpoint, max_num_batched_tokens=7, max_num_seqs=1)
    plain = SamplingParams(max_tokens=2)
    sampling = [plain, replace(plain, prompt_logprobs=3), replace(plain, prompt_logprobs=3), plain]
    token_ids = [*prompt(8), *prompt(2)]
    result = run_job(config, ALONE, [token_ids] * 4, sampling)
    assert result is not None
    assert result.completions[0] == result.completions[1] == result.completions[2]
    logs = by_transformers(checkpoint, token_ids, len(token_ids) - 1)
    for found in result.prompt_logprobs[1:3]:
        assert [one and one.logprob for one in found[1:]] == pytest.approx(
            [float(row[i]) for row, i in zip(logs, token_ids[1:], strict=True)], abs=1e-4
        )
    assert result.num_cached_prompt_tokens == len(token_ids) - 1  # of the last one alone


def job() -> tuple[list[list[int]], list[SamplingParams]]:
    return [prompt(number) for number in NUMBERS], [options(number) for number in NUMBERS]


@pytest.mark.parametrize("changes", [{}, {"async_scheduling": True, "num_blocks": 30}, {"max_num_batched_tokens": 40}])
def test_logprobs_are_those_of_transformers(checkpoint: Path, changes: dict[str, object]) -> None:
    check_all(checkpoint, run_job(config_for(checkpoint, **changes), ALONE, *job()))


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_any_split_gives_them(checkpoint: Path, tp: int, pp: int) -> None:
    with EngineGroup(tp, pp) as group:
        check_all(checkpoint, group.run(config_for(checkpoint, tp=tp, pp=pp), *job()))


def test_tokens_of_drafts_have_them(checkpoint: Path) -> None:
    config, number = config_for(checkpoint), 1
    model = load_config(config.model_dir)
    runner = RecordingRunner(config, model, ALONE, torch.device("cpu"))
    runner.logits = []
    engine = make_engine(config, model, runner, RecordingExecutor(runner, ALONE, None), b"names", lambda: 0.0)
    alone = run_job(config, ALONE, [prompt(number)], options(number))
    assert alone is not None
    engine.submit(Request("r", prompt(number), len(prompt(number)), options(number)))
    tokens: list[int] = []
    found: list[TokenLogprobs | None] = []
    while engine.scheduler.has_work():
        if tokens:
            engine.scheduler.propose("r", [*alone.completions[0][len(tokens) :][:2], 0])
        for token in events.tokens if (events := engine.step()) else ():
            tokens.append(token.token_id)
            found.append(token.logprobs)
    assert tokens == alone.completions[0]
    assert len(tokens) == MAX_TOKENS
    check(checkpoint, number, tokens, found)
