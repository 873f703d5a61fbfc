"""Sampling options in the engine: the same tokens alone, among others, split, preempted, handed off and begun again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Semaphore
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.workers.engine_group import EngineGroup, JobResult, RecordingExecutor, RecordingRunner, run_job
from tests.workers.request_kinds import BASE, KINDS, MAX_TOKENS, RECORD, options, prompt
from tests.workers.tiny_llama import make_checkpoint, write_tokenizer
from workers.config import EngineConfig
from workers.engine.request import Request, RequestRole
from workers.model.registry import load_config
from workers.parallel import ParallelGroups, Shard
from workers.runtime.build import make_engine
from workers.sampling.grammar_masks import GrammarMasks, MaskedRun

pytestmark = pytest.mark.xdist_group("sampling options")  # its fixtures are processes, made once

ALONE = ParallelGroups(Shard(), torch.device("cpu"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint("gqa", tmp_path_factory.mktemp("tiny"))
    write_tokenizer(path / "tokenizer.json")
    return path


def config_for(path: Path, **changes: object) -> EngineConfig:
    values = {"block_size": 4, "num_blocks": 400, "max_num_seqs": 32, "device": "cpu", "dtype": "float32", **changes}
    return EngineConfig(str(path), **values)


def run(config: EngineConfig, numbers: list[int]) -> JobResult:
    result = run_job(config, ALONE, [prompt(n) for n in numbers], [options(n) for n in numbers])
    assert result is not None
    return result


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """Each request alone, one after the other in one engine."""
    config = config_for(checkpoint, max_num_seqs=1)
    completions = run(config, list(range(32))).completions
    assert completions[1] != completions[1 + len(KINDS)]
    return completions


def text_of(token_ids: list[int]) -> str:
    return "".join(chr(32 + token_id) for token_id in token_ids)


def test_completions_have_the_form_of_their_grammar(expected: list[list[int]]) -> None:
    ended = 0
    for number, token_ids in enumerate(expected):
        grammar, text = options(number).grammar, text_of(token_ids)
        if grammar is None or len(token_ids) == MAX_TOKENS:
            continue
        ended += 1
        if grammar is RECORD:
            assert {type(value) for value in json.loads(text).values()} == {str, int}
        else:
            assert re.fullmatch(grammar.source, text)
    assert ended > 5


def test_a_batch_of_32_gets_the_tokens_that_each_gets_alone(checkpoint: Path, expected: list[list[int]]) -> None:
    assert run(config_for(checkpoint), list(range(32))).completions == expected


def test_preempted_requests_get_the_same_tokens(checkpoint: Path, expected: list[list[int]]) -> None:
    result = run(config_for(checkpoint, num_blocks=30, max_num_seqs=8), list(range(32)))
    assert result.num_preemptions > 0
    assert result.completions == expected


def test_async_scheduling_gives_the_same_tokens(checkpoint: Path, expected: list[list[int]]) -> None:
    result = run(config_for(checkpoint, async_scheduling=True, num_blocks=60), list(range(32)))
    assert result.num_preemptions > 0
    assert result.completions == expected


@pytest.mark.parametrize(("tp", "pp", "is_async"), [(2, 1, False), (1, 2, False), (1, 2, True)])
def test_any_split_gives_the_same_tokens(
    checkpoint: Path, expected: list[list[int]], tp: int, pp: int, is_async: bool
) -> None:
    with EngineGroup(tp, pp) as group:
        config = config_for(checkpoint, tp=tp, pp=pp, async_scheduling=is_async)
        found = group.run(config, [prompt(n) for n in range(32)], [options(n) for n in range(32)])
    assert found.completions == expected


def test_a_stream_that_is_begun_again_goes_on_the_same(checkpoint: Path, expected: list[list[int]]) -> None:
    """After a failover the tokens so far are given with the prompt; a decode worker gets the first one apart."""
    config = config_for(checkpoint)
    model = load_config(config.model_dir)
    runner = RecordingRunner(config, model, ALONE, torch.device("cpu"))
    runner.logits = []
    engine = make_engine(config, model, runner, RecordingExecutor(runner, ALONE, None), b"names", lambda: 0.0)
    expected_rest: dict[str, list[int]] = {}
    for number in range(32):
        first = 1 + 5 * (number % 4)
        known = expected[number][:first]
        if len(known) < first or first == len(expected[number]):
            continue
        is_decode = first == 1
        request = Request(
            f"r{number}", [*prompt(number), *([] if is_decode else known)], len(prompt(number)), options(number),
            role=RequestRole.DECODE if is_decode else RequestRole.MIXED,
        )  # fmt: skip
        engine.submit(request)
        if is_decode:
            engine.continue_request(request.request_id, known)
        expected_rest[request.request_id] = expected[number][first:]
    assert len(expected_rest) > 20
    found: dict[str, list[int]] = {name: [] for name in expected_rest}
    while engine.scheduler.has_work():
        events = engine.step()
        for token in events.tokens if events else ():
            found[token.request_id].append(token.token_id)
    assert found == expected_rest


@pytest.mark.parametrize("kind", [1, 2, 5, 6, 7, 8])
def test_right_and_wrong_drafts_change_nothing(checkpoint: Path, expected: list[list[int]], kind: int) -> None:
    config = config_for(checkpoint)
    model = load_config(config.model_dir)
    runner = RecordingRunner(config, model, ALONE, torch.device("cpu"))
    runner.logits = []
    engine = make_engine(config, model, runner, RecordingExecutor(runner, ALONE, None), b"names", lambda: 0.0)
    numbers = [kind, kind + len(KINDS)]
    for number in numbers:
        engine.submit(Request(f"r{number}", prompt(number), len(prompt(number)), options(number)))
    found: dict[str, list[int]] = {f"r{number}": [] for number in numbers}
    step = 0
    while engine.scheduler.has_work():
        for number in numbers:
            tokens = found[f"r{number}"]
            drafts = expected[number][len(tokens) :][:3]
            if drafts and step % 3:
                drafts[step % len(drafts)] = 1 + drafts[step % len(drafts)] % 90
            if tokens and drafts:
                engine.scheduler.propose(f"r{number}", drafts)
        step += 1
        events = engine.step()
        for token in events.tokens if events else ():
            found[token.request_id].append(token.token_id)
    assert found == {f"r{number}": expected[number] for number in numbers}
    assert step < MAX_TOKENS


def test_greedy_penalties_and_bans_are_those_of_transformers(checkpoint: Path) -> None:
    token_ids = prompt(8)
    sampling = replace(
        BASE, repetition_penalty=1.4, banned_token_ids=[17, 30], banned_sequences=[[2, 3], [61]], logit_bias={8: 2.0}
    )
    result = run_job(config_for(checkpoint), ALONE, [token_ids], sampling)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt_ids = torch.tensor([token_ids])
    out = model.generate(
        prompt_ids, attention_mask=torch.ones_like(prompt_ids), do_sample=False, max_new_tokens=MAX_TOKENS,
        pad_token_id=0, repetition_penalty=1.4, suppress_tokens=[17, 30], bad_words_ids=[[2, 3], [61]],
        sequence_bias={(8,): 2.0},
    )  # fmt: skip
    assert result is not None
    assert result.completions[0] == out[0, len(token_ids) :].tolist()


def test_min_tokens_holds_off_the_end_tokens(checkpoint: Path) -> None:
    greedy = replace(BASE, logit_bias={50: 100.0})
    stopping = replace(greedy, stop_token_ids=frozenset({50}))
    counts = []
    for sampling in (greedy, stopping, replace(stopping, min_tokens=7)):
        result = run_job(config_for(checkpoint), ALONE, [prompt(2)], sampling)
        assert result is not None
        counts.append(len(result.completions[0]))
    assert counts == [MAX_TOKENS, 0, 7]


def test_masks_are_filled_while_the_pass_runs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass of each step here goes on when its masks are there: it would wait in vain if they were made after it."""
    filled, in_time = Semaphore(0), []
    fill, forward = GrammarMasks._fill, RecordingRunner._run_stage

    def fill_and_tell(masks: GrammarMasks, runs: Sequence[MaskedRun]) -> npt.NDArray[np.bool_]:
        masks_of_step = fill(masks, runs)
        filled.release()
        return masks_of_step

    def forward_after_masks(runner: RecordingRunner, *step: Any) -> torch.Tensor:
        if runner._chooser._has_grammar.any():  # not in the steps that the engine measures at its start
            in_time.append(filled.acquire(timeout=20))
        return forward(runner, *step)

    monkeypatch.setattr(GrammarMasks, "_fill", fill_and_tell)
    monkeypatch.setattr(RecordingRunner, "_run_stage", forward_after_masks)
    assert run(config_for(checkpoint), [6]).completions[0]
    assert len(in_time) > 2
    assert all(in_time)
