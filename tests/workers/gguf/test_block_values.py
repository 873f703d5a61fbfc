"""Values of blocks against `gguf`'s own dequantiser, bit for bit, for every type that it knows."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from checkpoint.gguf.block_types import QUANTISED
from tests.checkpoint.gguf.gguf_files import random_rows
from workers.model.quant.gguf_blocks.affine import AFFINE
from workers.model.quant.gguf_blocks.dequantise import dequantise
from workers.model.quant.gguf_blocks.grids import GRIDS
from workers.model.quant.gguf_blocks.levels import LEVELS

_UNKNOWN_TO_GGUF = ("Q8_1", "Q8_K", "Q1_0", "Q2_0")
_QUANTISERS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")


def _same_bits(ours: torch.Tensor, theirs: npt.NDArray[np.float32]) -> bool:
    return bool(np.isfinite(theirs).all()) and np.array_equal(ours.numpy().view(np.uint32), theirs.view(np.uint32))


def test_every_type_has_values() -> None:
    assert AFFINE.keys() | LEVELS.keys() | GRIDS.keys() == QUANTISED.keys()
    known = {kind.name for kind in gguf.quants._type_traits} & QUANTISED.keys()
    assert QUANTISED.keys() - known == set(_UNKNOWN_TO_GGUF)


@pytest.mark.parametrize("name", sorted(QUANTISED.keys() - set(_UNKNOWN_TO_GGUF)))
def test_values_of_any_bytes(name: str) -> None:
    rows = random_rows(name, 24, 3)
    theirs = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name])
    assert _same_bits(dequantise(name, torch.from_numpy(rows)), theirs)


@pytest.mark.parametrize("name", _QUANTISERS)
def test_values_of_quantised_numbers(name: str) -> None:
    numbers = np.random.default_rng(0).standard_normal((8, 768)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name]
    rows = gguf.quants.quantize(numbers, kind)
    values = dequantise(name, torch.from_numpy(rows))
    assert _same_bits(values, gguf.quants.dequantize(rows, kind))
    error = np.linalg.norm(values.numpy() - numbers) / np.linalg.norm(numbers)
    assert error < (1.0 if name.startswith("TQ") else 0.2)


def test_types_that_gguf_does_not_read() -> None:
    """By ggml's descriptions: a scale, and codes; Q8_1 has a sum of them besides, Q8_K sums of groups of 16."""
    for name, offset, per_byte in (("Q8_1", 4, 1), ("Q8_K", 4, 1), ("Q1_0", 2, 8), ("Q2_0", 2, 4)):
        block = random_rows(name, 1, 1)[0]
        scale = block[:4].view(np.float32)[0] if name == "Q8_K" else np.float32(block[:2].view(np.float16)[0])
        wanted = []
        for byte in block[offset : offset + QUANTISED[name].block_size // per_byte]:
            if per_byte == 1:
                wanted.append(scale * np.float32(byte.view(np.int8)))
            bits = 8 // per_byte
            codes = [(int(byte) >> bits * part) & ((1 << bits) - 1) for part in range(per_byte)] if bits < 8 else []
            wanted += [scale * np.float32(2 * code - 1 if name == "Q1_0" else code - 1) for code in codes]
        values = dequantise(name, torch.from_numpy(block[None]))
        np.testing.assert_array_equal(values[0].numpy(), np.array(wanted, np.float32))


def test_values_come_in_the_dtype_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed in fp32 and rounded once, in steps or not."""
    rows = torch.from_numpy(random_rows("Q4_K", 24, 3))
    whole = dequantise("Q4_K", rows)
    monkeypatch.setattr("workers.model.quant.gguf_blocks.dequantise._VALUES_AT_ONCE", 512)
    assert torch.equal(dequantise("Q4_K", rows, torch.bfloat16), whole.bfloat16())
