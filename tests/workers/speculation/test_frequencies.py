"""With drafts, tokens are still a sample of the model's own distribution: their counts against transformers' softmax.

Equality with plain decoding would not show an error that both have.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.chi_square import p_value
from tests.workers.engine_group import run_job
from tests.workers.tiny_llama import make_checkpoint
from workers.config import EngineConfig, SpeculativeOptions
from workers.parallel import ParallelGroups, Shard
from workers.sampling.params import SamplingParams

ALONE = ParallelGroups(Shard(), torch.device("cpu"))
PROMPT = [3, 50, 7, 50, 7, 22]
VOCABULARY = [5, 7, 22, 50, 80]
TEMPERATURE = 1.3
NUM_SAMPLES = 1500


def probabilities(checkpoint: Path) -> dict[tuple[int, int], float]:
    """Of the second and third token, given the first is any."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    found: dict[tuple[int, int], float] = dict.fromkeys(itertools.product(VOCABULARY, repeat=2), 0.0)

    def next_shares(tail: list[int]) -> list[float]:
        with torch.inference_mode():
            logits = model(torch.tensor([PROMPT + tail])).logits[0, -1, VOCABULARY].double()
        return torch.softmax(logits / TEMPERATURE, dim=-1).tolist()

    for first, share in zip(VOCABULARY, next_shares([]), strict=True):
        for second, share_2 in zip(VOCABULARY, next_shares([first]), strict=True):
            for third, share_3 in zip(VOCABULARY, next_shares([first, second]), strict=True):
                found[second, third] += share * share_2 * share_3
    return found


def test_tokens_have_the_frequencies_of_the_softmax(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("gqa", tmp_path)
    draft = make_checkpoint("tied", tmp_path)
    config = EngineConfig(
        str(checkpoint), "float32", "cpu", block_size=4, num_blocks=400, max_num_seqs=32,
        speculative=SpeculativeOptions(method="draft_model", model=str(draft)),
    )  # fmt: skip
    sampling = [
        SamplingParams(TEMPERATURE, seed=seed, max_tokens=4, ignore_eos=True, allowed_token_ids=VOCABULARY)
        for seed in range(NUM_SAMPLES)
    ]
    result = run_job(config, ALONE, [PROMPT] * NUM_SAMPLES, sampling)
    assert result is not None
    assert result.speculation is not None
    assert result.speculation.num_accepted_tokens > NUM_SAMPLES / 4
    counts = Counter((completion[1], completion[2]) for completion in result.completions)
    expected = probabilities(checkpoint)
    assert set(counts) <= set(expected)
    assert p_value([counts[pair] for pair in expected], list(expected.values())) > 1e-3
