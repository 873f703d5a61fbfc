"""The hidden states that a step gives to a drafter are those that transformers has before the same layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.workers.engine_group import run_job
from tests.workers.speculation.scripted import Scripted
from tests.workers.speculation.tiny_eagle import make_head
from tests.workers.tiny_llama import make_checkpoint, write_tokenizer
from workers.config import EngineConfig, SpeculativeOptions
from workers.engine.request import Pooling
from workers.engine.step import SchedulerOutput
from workers.parallel import ParallelGroups, Shard
from workers.sampling.params import SamplingParams
from workers.speculation.features import StepFeatures

PROMPTS = [[(7 * n + 3 * i * i) % 97 for i in range(length)] for n, length in enumerate((5, 23, 40))]
SAMPLING = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint("gqa", tmp_path_factory.mktemp("tiny"))
    write_tokenizer(path / "tokenizer.json")
    return path


@dataclass
class Listening(Scripted):
    """Keeps what it is given, by request and position; later steps correct earlier ones."""

    heard: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def computed(self, plan: SchedulerOutput, features: object) -> None:
        assert isinstance(features, StepFeatures)
        columns = zip(plan.requests, plan.start_positions, plan.num_tokens, features.first_rows, strict=True)
        for request, start, count, first in columns:
            for offset in range(count):
                self.heard.setdefault(request.request_id, {})[start + offset] = features.hidden[first + offset]


def heard_by(config: EngineConfig, wanted: Sequence[SamplingParams | Pooling], plain: list[list[int]]) -> Listening:
    completions = {f"r{i}": completion for i, completion in enumerate(plain)}
    drafter = Listening("often_right", completions, 97)
    run_job(config, ParallelGroups.connect(Shard(), torch.device("cpu"), "", ""), PROMPTS, wanted, drafter=drafter)
    return drafter


@pytest.mark.parametrize("layers", [(2, 1, 0), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("changes", [{}, {"cuda_graphs": True}, {"async_scheduling": True}], ids=str)
def test_as_transformers_has_them(
    checkpoint: Path, tmp_path: Path, layers: tuple[int, ...], changes: dict[str, object]
) -> None:
    values = {"block_size": 4, "num_blocks": 200, "max_num_seqs": 4, "max_num_batched_tokens": 32, **changes}
    config = EngineConfig(str(checkpoint), "float32", "cpu", **values)
    groups = ParallelGroups.connect(Shard(), torch.device("cpu"), "", "")
    plain = run_job(config, groups, PROMPTS, SAMPLING)
    assert plain is not None
    head = make_head(tmp_path, eagle_aux_hidden_state_layer_ids=list(layers))
    config = EngineConfig(
        str(checkpoint), "float32", "cpu", speculative=SpeculativeOptions(method="eagle3", model=str(head)), **values
    )
    wanted = [SAMPLING, Pooling.MEAN, SAMPLING]  # one of them is an embedding, beside which others decode
    drafter = heard_by(config, wanted, plain.completions)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.model.norm = torch.nn.Identity()  # its last hidden state is the normed one
    for number in (0, 2):
        token_ids = PROMPTS[number] + plain.completions[number]
        with torch.inference_mode():
            states = model.model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
        expected = torch.cat([states[layer][0] for layer in layers], -1)
        found = drafter.heard[f"r{number}"]
        positions = range(len(token_ids) - 1)  # nothing is computed of the last
        assert set(positions) <= set(found)
        torch.testing.assert_close(torch.stack([found[p] for p in positions]), expected[:-1], atol=1e-4, rtol=1e-4)
