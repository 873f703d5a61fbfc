"""Drafts go on while the model judges the last ones: fewer of them are waited for, and the tokens are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.workers.engine_group import RecordingExecutor, RecordingRunner, make_request, run_to_end
from tests.workers.request_kinds import options, prompt
from tests.workers.tiny_llama import make_checkpoint, write_tokenizer
from workers.config import EngineConfig, SpeculativeOptions
from workers.engine.request import Request
from workers.model.registry import load_config
from workers.parallel import ParallelGroups, Shard
from workers.runtime.build import make_engine
from workers.runtime.drafting.build import load_draft
from workers.speculation.drafters.draft_model import DraftModel
from workers.speculation.speculator import Speculator
from workers.speculation.step_costs import StepCosts

ALONE = ParallelGroups(Shard(), torch.device("cpu"))
NUMBERS = range(9)


class Counted:
    """A draft model whose steps seem to take no time beside the model's, and that counts what it does ahead."""

    is_costly = True

    def __init__(self, draft: DraftModel) -> None:
        self._draft = draft
        self.num_ahead = 0

    def ahead(self, requests: Sequence[Request], num_tokens: int) -> None:
        self.num_ahead += 1
        self._draft.ahead(requests, num_tokens)

    def draft_s(self, lengths: Sequence[int]) -> float:
        return 1e-6 * max(lengths, default=0)

    def __getattr__(self, name: str) -> object:
        return getattr(self._draft, name)


@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_tokens_are_the_same(tmp_path: Path, shape: str) -> None:
    """With the model itself as draft, and with another one, which is mostly wrong."""
    checkpoint = make_checkpoint("gqa", tmp_path)
    for path in {checkpoint, make_checkpoint(shape, tmp_path)}:
        write_tokenizer(path / "tokenizer.json")
    config = EngineConfig(
        str(checkpoint), "float32", "cpu", block_size=4, num_blocks=400, max_num_seqs=4, batch_invariant=True,
        async_scheduling=True,
        speculative=SpeculativeOptions(
            method="draft_model", model=str(tmp_path / shape), enable_adaptive_verification=True
        ),
    )  # fmt: skip

    def run(is_drafted: bool) -> tuple[dict[str, list[int]], int]:
        model = load_config(config.model_dir)
        runner = RecordingRunner(config, model, ALONE, torch.device("cpu"))
        runner.logits = []
        draft = load_draft(replace(config, batch_invariant=False), torch.device("cpu"))
        assert isinstance(draft, DraftModel)
        counted = Counted(draft)
        costs = StepCosts({(batch, drafts): 1.0 for batch in (1, 4) for drafts in (0, 1, 32)})
        speculator = Speculator(config.speculative, [counted], costs, lambda: 0.0) if is_drafted else None
        executor = RecordingExecutor(runner, ALONE, 1)
        engine = make_engine(config, model, runner, executor, b"names", lambda: 0.0, speculation=speculator)
        tokens = run_to_end(engine, [make_request(n, prompt(n), options(n)) for n in NUMBERS])
        engine.close()
        return tokens, counted.num_ahead

    expected, _ = run(is_drafted=False)
    found, num_ahead = run(is_drafted=True)
    assert found == expected
    assert num_ahead > 5
