"""Adapters over a GGUF, whose queries and keys lie in another order of rows: logits are those of peft."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.gguf.directory import open_gguf
from tests.checkpoint.gguf.gguf_files import demo_tokenizer, quantised, stored_tensors, weights_of, write_gguf
from tests.peft_adapters import load_adapted, make_adapter, ref_of
from tests.workers.adapters.test_matches_peft import GREEDY, assert_close, config_of, last_logits
from tests.workers.engine_group import EngineGroup
from tests.workers.gguf.test_serving import MIXTURES, PROMPTS, _oracle_model


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def single() -> Iterator[EngineGroup]:
    with EngineGroup(1, 1) as group:
        yield group


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_logits_are_those_of_peft(single: EngineGroup, tmp_path: Path, architecture: str) -> None:
    path = tmp_path / f"{architecture}.gguf"
    weights = weights_of(architecture, len(demo_tokenizer()["ggml.tokens"]), tied=False)
    write_gguf(path, architecture, quantised(stored_tensors(architecture, weights), MIXTURES["Q4_0"]))
    directory = open_gguf(path)
    _oracle_model(path, directory).save_pretrained(tmp_path / "dense")
    adapter = make_adapter(tmp_path / "dense", tmp_path / "adapter", std=0.1)
    found = single.run(config_of(directory, single), PROMPTS, GREEDY, [ref_of(adapter)] * 2)
    model = load_adapted(tmp_path / "dense", adapter)
    for i, prompt in enumerate(PROMPTS):
        assert_close(found.logits[i], last_logits(model, prompt, found.completions[i]))
