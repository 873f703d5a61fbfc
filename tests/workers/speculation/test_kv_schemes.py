"""Rejected drafts leave nothing in a cache of any form: whoever packs a block that a draft filled packs it again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore.config import KV_CACHE_DTYPES
from tests.workers.engine_group import JobResult, run_job
from tests.workers.request_kinds import options, prompt
from tests.workers.speculation.scripted import Scripted
from tests.workers.tiny_llama import make_checkpoint, write_tokenizer
from workers.config import EngineConfig
from workers.parallel import ParallelGroups, Shard

ALONE = ParallelGroups(Shard(), torch.device("cpu"))
NUMBERS = range(9)
QUICK = ("int8", "fp8", "kivi2", "wkv4")  # one scheme of each kind; the others run in the slow lane
FEW_EXACT = {"kv_window_tokens": 6, "kv_sink_tokens": 5}  # so that most of a short prompt is packed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint("gqa", tmp_path_factory.mktemp("tiny"))
    write_tokenizer(path / "tokenizer.json")
    return path


@pytest.mark.parametrize(
    "kv_cache_dtype",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in KV_CACHE_DTYPES[1:]],
)
def test_drafts_change_no_token(checkpoint: Path, kv_cache_dtype: str) -> None:
    config = EngineConfig(
        str(checkpoint), "float32", "cpu", block_size=4, num_blocks=400, max_num_seqs=4, batch_invariant=True,
        kv_cache_dtype=kv_cache_dtype, **FEW_EXACT,
    )  # fmt: skip

    def run(changed: EngineConfig, drafter: Scripted | None) -> JobResult:
        result = run_job(
            changed, ALONE, [prompt(n) * 2 for n in NUMBERS], [options(n) for n in NUMBERS], drafter=drafter
        )
        assert result is not None
        return result

    plain = run(config, None)
    completions = {f"r{i}": completion for i, completion in enumerate(plain.completions)}
    for blocks in (400, 40):
        found = run(replace(config, num_blocks=blocks), Scripted("often_right", completions, 97))
        assert found.completions == plain.completions
        assert found.speculation is not None
        assert 0 < found.speculation.num_accepted_tokens < found.speculation.num_draft_tokens
