"""An adapted model's logits are those of peft: all modules, ranks and patterns, tensor-parallel and in stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.peft_adapters import load_adapted, load_base, make_adapter, ref_of
from tests.workers.engine_group import EngineGroup
from tests.workers.tiny_llama import make_checkpoint, prompts
from workers.config import EngineConfig
from workers.sampling.params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
TOLERANCE = 1e-4  # of the largest logit: all in fp32, sums in another order
KINDS: dict[str, dict[str, Any]] = {
    "all": {},
    "rslora": {"use_rslora": True, "r": 8},
    "patterns": {
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 12},
        "alpha_pattern": {"k_proj": 3, "down_proj": 20},
    },
    "queries": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "mlp": {"target_modules": r".*mlp\.(gate|down)_proj", "r": 16},
}


@pytest.fixture(scope="module", params=[(1, 1), (2, 1), (1, 2)], ids=lambda p: f"tp{p[0]}-pp{p[1]}")
def group(request: pytest.FixtureRequest):
    with EngineGroup(*request.param) as group:
        yield group


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


def config_of(base: Path, group: EngineGroup, **options: Any) -> EngineConfig:
    given = {"dtype": "float32", "block_size": 4, "num_blocks": 64, "max_num_batched_tokens": 16, **options}
    return EngineConfig(str(base), device="cpu", tp=group.tp, pp=group.pp, enable_lora=True, **given)


def last_logits(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Of the positions that choose the completion."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + completion])).logits[0]
    return torch.as_tensor(logits[len(prompt) - 1 : -1])


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    share = expected[:, : found.shape[1]]  # the leader's share of the vocabulary
    assert (found - share).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("shape", ["gqa", "qwen3", "head_dim"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_peft(group: EngineGroup, folder: Path, shape: str, kind: str) -> None:
    base = make_checkpoint(shape, folder)
    adapter = make_adapter(base, folder / f"{shape}-{kind}", seed=len(kind), **KINDS[kind])
    asked = [*prompts(), prompts()[0]]
    found = group.run(config_of(base, group), asked, GREEDY, [ref_of(adapter)] * 3 + [None])
    models = [load_adapted(base, adapter)] * 3 + [load_base(base)]
    merged = load_adapted(base, adapter, is_merged=True)
    assert found.completions[0] != found.completions[3], "the adapter changes what is chosen"
    for i, (prompt, model, completion) in enumerate(zip(asked, models, found.completions, strict=True)):
        expected = last_logits(model, prompt, completion)
        assert completion == expected.argmax(dim=1).tolist()
        if found.logits:  # the leader of one stage has them
            assert_close(found.logits[i][:, : expected.shape[1]], expected)
            if i < 3:
                assert_close(found.logits[i], last_logits(merged, prompt, completion))
    assert found.adapter_counts[1:] == (1, 1)
