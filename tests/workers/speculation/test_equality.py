"""Speculation changes no token: with any drafter, any sampling options, on any split of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.workers.engine_group import EngineGroup, JobResult
from tests.workers.request_kinds import KINDS, options, prompt
from tests.workers.speculation.scripted import RULES, Scripted
from tests.workers.speculation.tiny_eagle import make_head
from tests.workers.tiny_llama import make_checkpoint, write_tokenizer
from workers.config import EngineConfig, SpeculativeOptions

pytestmark = pytest.mark.xdist_group("speculation equality")  # its fixtures are processes, made once

NUMBERS = list(range(18))  # two requests of each kind
REPEATED = [5, 9, 2, 44, 5, 9, 2, 44, 5, 9, 2]  # a prompt whose n-grams come again


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint("gqa", tmp_path_factory.mktemp("tiny"))
    write_tokenizer(path / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint("tied", tmp_path_factory.mktemp("draft"))
    write_tokenizer(path / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_head(tmp_path_factory.mktemp("head"))


def on_splits(name: str, values: Sequence[object], on_four: Sequence[object]) -> pytest.MarkDecorator:
    """Each value on one rank, and some on four, which two cores take long for; the rest is for the slow lane."""
    cases = [
        pytest.param(
            split, value, id=f"tp{split[0]}-pp{split[1]}-{value}",
            marks=[pytest.mark.slow] * (split != (1, 1) and (split != (2, 2) or value not in on_four)),
        )
        for split in ((1, 1), (2, 1), (1, 2), (2, 2))
        for value in values
    ]  # fmt: skip
    return pytest.mark.parametrize(("group", name), cases, indirect=["group"])


_SPLITS = [(1, 1), pytest.param((2, 1), marks=pytest.mark.slow), pytest.param((1, 2), marks=pytest.mark.slow), (2, 2)]


@pytest.fixture(scope="module", params=_SPLITS, ids=lambda p: f"tp{p[0]}-pp{p[1]}")
def group(request: pytest.FixtureRequest) -> Iterator[EngineGroup]:
    with EngineGroup(*request.param) as started:
        yield started


def config_for(path: Path, group: EngineGroup, **changes: object) -> EngineConfig:
    values = {
        "block_size": 4, "num_blocks": 400, "max_num_seqs": 8, "device": "cpu", "dtype": "float32",
        "batch_invariant": True, "tp": group.tp, "pp": group.pp, **changes,
    }  # fmt: skip
    return EngineConfig(str(path), **values)


def prompts() -> list[list[int]]:
    """Half of them have a prefix in common, and are repetitive."""
    return [prompt(n) if n % 2 else REPEATED + prompt(n) for n in NUMBERS]


def run(group: EngineGroup, config: EngineConfig, drafter: Scripted | None = None) -> JobResult:
    wanted = [replace(options(n), logprobs=2 if n % 3 == 0 else None) for n in NUMBERS]
    wanted[4] = replace(wanted[4], prompt_logprobs=1)
    return group.run(config, prompts(), wanted, drafter=drafter)


@pytest.fixture(scope="module")
def plain(group: EngineGroup, checkpoint: Path) -> JobResult:
    return run(group, config_for(checkpoint, group))


def completions_of(result: JobResult) -> dict[str, list[int]]:
    return {f"r{i}": completion for i, completion in enumerate(result.completions)}


@on_splits("rule", RULES, on_four=("sometimes", "often_right"))
def test_scripted_drafters(group: EngineGroup, checkpoint: Path, plain: JobResult, rule: str) -> None:
    assert len(KINDS) * 2 == len(NUMBERS)
    found = run(group, config_for(checkpoint, group), Scripted(rule, completions_of(plain), 97))
    assert found.completions == plain.completions
    assert found.logprobs == plain.logprobs
    assert found.prompt_logprobs == plain.prompt_logprobs
    counters = found.speculation
    assert counters is not None
    assert counters.num_draft_tokens > 100
    assert sum(counters.num_accepted_tokens_per_pos) == counters.num_accepted_tokens
    if rule == "perfect":
        assert counters.num_accepted_tokens == counters.num_draft_tokens
    if rule == "wrong":
        assert counters.num_accepted_tokens == 0


@on_splits("method", ["ngram", "suffix", "grammar", "draft_model"], on_four=["draft_model"])
def test_real_drafters(group: EngineGroup, checkpoint: Path, draft: Path, plain: JobResult, method: str) -> None:
    speculative = SpeculativeOptions(method=method, model=str(draft) if method == "draft_model" else "")
    found = run(group, config_for(checkpoint, group, speculative=speculative))
    assert found.completions == plain.completions
    assert found.logprobs == plain.logprobs
    assert found.speculation is not None
    assert found.speculation.num_accepted_tokens > 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_blocks": 34},
        *(pytest.param(one, marks=pytest.mark.slow) for one in ({"async_scheduling": True}, {"cuda_graphs": True})),
    ],
    ids=str,
)
def test_drafts_of_a_head(
    group: EngineGroup, checkpoint: Path, head: Path, plain: JobResult, changes: dict[str, object]
) -> None:
    """It is one of random weights: what it is right about is right by the noise that it shares with the model."""
    if group.pp > 1:
        pytest.skip("a head needs pp=1")
    speculative = SpeculativeOptions(
        method="eagle3", model=str(head), draft_temperature_scale=2.0, draft_model_lookup_min=0
    )
    found = run(group, config_for(checkpoint, group, speculative=speculative, **changes))
    assert found.completions == plain.completions
    assert found.logprobs == plain.logprobs
    assert found.prompt_logprobs == plain.prompt_logprobs
    assert found.speculation is not None
    assert found.speculation.num_draft_tokens > 500
    assert found.speculation.num_accepted_tokens > 0
    assert (found.num_preemptions > 0) == ("num_blocks" in changes)


def test_preempted_requests(group: EngineGroup, checkpoint: Path, plain: JobResult) -> None:
    drafter = Scripted("often_right", completions_of(plain), 97)
    found = run(group, config_for(checkpoint, group, num_blocks=34), drafter)
    assert found.num_preemptions > 0
    assert found.completions == plain.completions


def test_async_scheduling(group: EngineGroup, checkpoint: Path, plain: JobResult) -> None:
    if group.tp * group.pp == 4:
        pytest.skip("async scheduling needs tp=1 or pp=1")
    config = config_for(checkpoint, group, async_scheduling=True)
    for rule in ("often_right", "sometimes"):
        found = run(group, config, Scripted(rule, completions_of(plain), 97))
        assert found.completions == plain.completions
        assert found.speculation is not None
        assert found.speculation.num_accepted_tokens > 100
