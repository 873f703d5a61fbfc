"""The committed fixtures as models, and logits of a whole pass through one rank's stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from workers.kv.schemes.paged_layer import PagedLayer
from workers.model.batch import Batch, GroupInputs
from workers.model.loader import Checkpoint
from workers.model.quant.storage import Cut, StoredFormat
from workers.model.quant.weights import InputChange
from workers.model.registry import load_config
from workers.model.stage import build_stage
from workers.parallel import ParallelGroups, Shard

CPU = torch.device("cpu")
FIXTURES = Path(__file__).parent / "fixtures"
MODELS = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
# Formats whose inputs are rounded by the tool that made them, and in which way otherwise than here.
ROUNDS_INPUTS = {
    "ct-w8a8": "scale = largest / 127.5 there, / 127 here",
    "ct-w4a8": "the same",
    "ct-mixed": "the same",
    "bnb-int8": "whole columns with outliers stay unrounded there, the outliers alone here",
    "ct-fp8-dynamic": "inputs are rounded to e4m3 there, not at all here",
    "ct-fp8-static": "the same",
    "ct-fp8-block": "the same",
    "ct-fp8-kv": "the same, and the KV cache",
    "ct-nvfp4": "inputs of 4 bits are rounded there, not at all here",
    "ct-nvfp4-a4": "the same",
    "modelopt-fp8": "inputs are rounded to e4m3 there, not at all here",
    "modelopt-fp8-kv": "the same",
    "modelopt-int8-sq": "half-integers may be rounded to the other side",
}
_BLOCK_SIZE = 16


def oracle(name: str) -> dict[str, torch.Tensor]:
    """What the outside tool says of a fixture: dequantized matrices, and logits of the last positions."""
    return load_file(FIXTURES / name / "oracle.safetensors")


def dequantized(directory: Path, matrix: str, shape: tuple[int, int]) -> torch.Tensor:
    """fp32, as this project reads the matrix."""
    weight_format = load_config(directory).weight_format
    assert isinstance(weight_format, StoredFormat)
    weights = Checkpoint(directory, torch.float32, CPU)
    cut = Cut(matrix, *shape, slice(0, shape[0]), slice(0, shape[1]))
    weight = weight_format.rule.storage_of(matrix).read(weights, cut)
    # Tools do not count the inputs' multiplier to the matrix.
    return replace(weight, inputs_change=InputChange(weight.inputs_change.order)).dense(torch.float32)


def last_logits(directory: Path, dtype: torch.dtype, token_ids: torch.Tensor, count: int) -> torch.Tensor:
    """fp32 [count, vocab] of the last positions of a prompt, computed in one pass."""
    model = load_config(directory)
    stage = build_stage(model, Checkpoint(directory, dtype, CPU), ParallelGroups(Shard(), CPU))
    n = len(token_ids)
    blocks = torch.arange(-(-n // _BLOCK_SIZE), dtype=torch.int32)
    caches = [
        PagedLayer(0, torch.zeros(len(blocks), spec.num_kv_heads, 2, _BLOCK_SIZE, spec.head_dim, dtype=dtype))
        for spec in model.cache_specs
    ]
    batch = Batch(
        token_ids,
        torch.arange(n),
        (GroupInputs(blocks[None], torch.arange(n)),),
        0,
        torch.tensor([n], dtype=torch.int32),
        torch.tensor([0, n], dtype=torch.int32),
        n,
        torch.arange(n - count, n),
    )
    with torch.inference_mode():
        return stage.forward(batch, caches, None).float()


def whole(name: str, outputs: int, inputs: int) -> Cut:
    """All of a matrix."""
    return Cut(name, outputs, inputs, slice(0, outputs), slice(0, inputs))
