"""Packing: what is written is read back as the numbers that the methods meant, and bits lie where the format says."""

from __future__ import annotations

import pytest
import torch

from compress.formats.compressed_tensors import (
    decode,
    e2m1_codes,
    e2m1_values,
    encode,
    pack_halves,
    pack_words,
    unpack_halves,
    unpack_words,
)
from compress.grids.floating import E2M1, round_e2m1
from compress.methods.gptq import GptqOptions, gptq
from compress.methods.nearest import round_to_nearest
from compress.schemes import SCHEME_NAMES, scheme_named

STORED = [name for name in SCHEME_NAMES if name not in ("plain", "nf4")]


def draw(outputs: int, inputs: int) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs + inputs)) * 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", STORED)
def test_what_is_stored_is_what_was_meant(name: str, dtype: torch.dtype) -> None:
    scheme, weight = scheme_named(name, 32), draw(136, 160)
    assert scheme.grid is not None
    rounded = round_to_nearest(weight, scheme.grid, weight.abs().max(), dtype)
    found = decode(encode(rounded, dtype), scheme, *weight.shape)
    torch.testing.assert_close(found, rounded.values, rtol=1e-6, atol=0)
    assert (found - weight).norm() / weight.norm() < (0.17 if scheme.grid.bits == 4 else 0.04)


@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym", "w8a16"])
def test_permuted_groups_are_stored_with_their_columns(name: str) -> None:
    scheme, weight = scheme_named(name, 32), draw(64, 128)
    inputs = torch.randn(400, 128) * torch.rand(128)
    assert scheme.grid is not None
    hessian = inputs.T @ inputs / 400
    rounded = gptq(weight, hessian, scheme.grid, weight.abs().max(), torch.bfloat16, GptqOptions("permuted"))
    parts = encode(rounded, torch.bfloat16)
    assert parts["weight_g_idx"].bincount().tolist() == [32] * 4
    torch.testing.assert_close(decode(parts, scheme, 64, 128), rounded.values, rtol=1e-6, atol=0)


def test_words_hold_the_first_column_in_the_lowest_bits() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15, 9]])
    words = pack_words(codes, 4)
    assert words.tolist() == [[0xF7654321 - (1 << 32), 9]]
    assert torch.equal(unpack_words(words, 4, 9), codes)
    assert pack_words(torch.tensor([[1, 2, 3, 255]]), 8).tolist() == [[0xFF030201 - (1 << 32)]]


def test_bytes_hold_the_first_column_in_the_lower_half() -> None:
    packed = pack_halves(torch.tensor([[1, 2, 3, 15]]))
    assert packed.tolist() == [[0x21, 0xF3]]
    assert unpack_halves(packed).tolist() == [[1, 2, 3, 15]]


def test_4_bit_floats_round_to_the_nearest_and_ties_to_even() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0, -0.75, -5.0])
    assert round_e2m1(ties).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, -1, -4]
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    assert e2m1_codes(values).tolist() == list(range(16))
    assert torch.equal(e2m1_values(torch.arange(16)), values)
