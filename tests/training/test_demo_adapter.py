"""The adapter that is committed: its card says what is measured, and a worker serves what was trained."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from checkpoint.adapters.directory import read_adapter
from tests.peft_adapters import ref_of
from tests.workers.engine_group import run_job
from training import train
from training.qlora import data, run
from training.qlora.adapter import LoraOptions
from training.qlora.model import AdaptedModel, open_model
from workers.config import EngineConfig
from workers.parallel import ParallelGroups, Shard
from workers.sampling.params import SamplingParams

BASE, ADAPTER = train.MODELS / "demo", train.MODELS / "demo-adapter-docstrings"
HELD_OUT = Path(train.__file__).parent / "data" / "docstrings" / "held_out"
SERVED_ROWS = 6
FIGURES = ("base_plain", "with_adapter_plain", "base_nf4", "with_adapter_nf4")


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    tok = data.tokenizer_of(BASE)
    return data.rows_of(tok, data.read_texts([HELD_OUT], "held-out"), 0, 512, "held-out")


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    """The demo model with the committed adapter merged into its plain weights."""
    from safetensors.torch import load_file

    config = read_adapter(ADAPTER).config
    model = open_model(BASE, LoraOptions(config.rank, config.alpha), is_quantized=False)
    stored = load_file(ADAPTER / "adapter_model.safetensors")
    for name, pair in model.pairs.items():
        for which in ("lora_A", "lora_B"):
            tensor = stored.pop(f"base_model.model.{name}.{which}.weight")
            getattr(pair, which).data.copy_(tensor)
    assert not stored
    model.merge()
    return model


def test_the_card_says_what_the_run_measured() -> None:
    reported = json.loads((ADAPTER / "training_history.json").read_text())
    losses = [row["loss_nats"] for row in reported["history"]]
    assert sum(losses[-20:]) < 0.85 * sum(losses[:20])
    card = (ADAPTER / "README.md").read_text()
    for name in FIGURES:
        assert re.search(rf"\| {reported['held_out'][name]:.3f} \|", card), name
    assert sum(path.stat().st_size for path in ADAPTER.iterdir()) < 1e6


def test_the_perplexities_are_those_that_are_reported(adapted: AdaptedModel, rows: torch.Tensor) -> None:
    reported = json.loads((ADAPTER / "training_history.json").read_text())["held_out"]
    base = open_model(BASE, None, is_quantized=False)
    assert run.perplexity(adapted, rows) == pytest.approx(reported["with_adapter_plain"], rel=1e-3)
    assert run.perplexity(base, rows) == pytest.approx(reported["base_plain"], rel=1e-3)
    assert reported["with_adapter_plain"] < 0.85 * reported["base_plain"]


def test_a_worker_serves_what_was_trained(adapted: AdaptedModel, rows: torch.Tensor) -> None:
    """By the logprobs of prompts, with and without the adapter in one batch; the base's are those of the base alone."""
    base = open_model(BASE, None, is_quantized=False)
    chosen = rows[:SERVED_ROWS]
    config = EngineConfig(str(BASE), device="cpu", dtype="float32", num_blocks=512, enable_lora=True)
    asked = [row.tolist() for row in chosen for _ in range(2)]
    adapter = ref_of(ADAPTER)
    result = run_job(
        config,
        ParallelGroups(Shard(), torch.device("cpu")),
        asked,
        SamplingParams(max_tokens=1, prompt_logprobs=0),
        [adapter, None] * SERVED_ROWS,
    )
    assert result is not None
    for first, model in ((0, adapted), (1, base)):
        found = [one for row in result.prompt_logprobs[first::2] for one in row[1:]]
        assert all(one is not None for one in found)
        served = math.exp(-sum(one.logprob for one in found if one is not None) / len(found))
        assert served == pytest.approx(run.perplexity(model, chosen), rel=1e-4)


def test_the_style_is_seen_at_once(adapted: AdaptedModel) -> None:
    """Greedy completions of a function's first line."""
    tok = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    base = open_model(BASE, None, is_quantized=False)
    for line in ("def read_header(file, size=None):", "    def add_entry(self, name, value):"):
        for model, has_sections in ((adapted, True), (base, False)):
            ids = [0, *tok.encode(line).ids]
            with torch.no_grad():
                for _ in range(40):
                    ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
            assert ("Args:" in tok.decode(ids)) == has_sections, tok.decode(ids)
