"""The model of a fake cluster: its directory, and the tokens that are right for a prompt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.processes import REPOSITORY
from workers.runtime.fake.model import fake_completion

DEMO = REPOSITORY / "models" / "demo"
MODEL_NAME = "fake"
VOCAB_SIZE = 4096  # the demo tokenizer's
SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 2048,
}


def write_fake_model(directory: Path, **sizes: int) -> Path:
    """A model directory for the fake engine: config and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, directory / name)
    (directory / "config.json").write_text(json.dumps({**SIZES, **sizes}))
    return directory


def expected(
    prompt: Sequence[int], num_tokens: int, temperature: float = 0.0, seed: int = 1, adapter: bytes = b""
) -> list[int]:
    """What every fake cluster makes of a prompt. adapter: digest."""
    return fake_completion(prompt, num_tokens, VOCAB_SIZE, temperature, seed, adapter)
