"""Fragments in 8 bits: what they take up, what they lose, and that nothing else about them changes."""

from __future__ import annotations

import pytest
import torch

from kernels.quantise import FP8
from kvstore.config import KV_ENCODINGS
from workers.config import kv_row_bytes
from workers.kv.codec import decode, encode, row_errors

LOSSY = ("int8", "fp8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def round_trip(rows: torch.Tensor, encoding: str) -> torch.Tensor:
    return decode(encode(rows[None], encoding), rows.shape[-1], rows.dtype, encoding)[0].view(rows.shape)


def rounding(rows: torch.Tensor) -> torch.Tensor:
    """How far apart two numbers of the rows' dtype are at each; below its smallest normal number, as far as there."""
    numbers = torch.finfo(rows.dtype)
    return rows.float().abs().clamp(min=numbers.smallest_normal) * numbers.eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("encoding", KV_ENCODINGS)
def test_a_fragment_has_the_size_that_is_said(encoding: str, dtype: torch.dtype) -> None:
    rows = torch.randn(5, 3, 2, 16, 32).to(dtype)
    encoded = encode(rows, encoding)
    assert encoded.dtype == torch.uint8
    assert encoded.is_contiguous()
    assert encoded.shape == (5, 3 * 2 * 16 * kv_row_bytes(encoding, 32, dtype.itemsize))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_raw_is_bit_for_bit(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 2, 7, 24).to(dtype)
    assert torch.equal(round_trip(rows, "none"), rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [3, 24, 128])
def test_int8_is_within_half_a_step_of_each_number(dtype: torch.dtype, head_dim: int) -> None:
    random = torch.Generator().manual_seed(head_dim)
    rows = (torch.randn(4, 2, 16, head_dim, generator=random) * torch.logspace(-4, 3, 16)[:, None]).to(dtype)
    got = round_trip(rows, "int8")
    step = rows.float().abs().amax(-1, keepdim=True) / 127
    assert ((got.float() - rows.float()).abs() <= step * 0.5001 + rounding(rows)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [3, 24, 128])
def test_fp8_is_within_a_sixteenth_of_each_number(dtype: torch.dtype, head_dim: int) -> None:
    """Three bits of mantissa; near zero, half of the smallest number there is."""
    rows = (torch.randn(4, 2, 16, head_dim) * torch.logspace(-2, 2, 16)[:, None]).to(dtype)
    got = round_trip(rows, "fp8")
    smallest = rows.float().abs().amax(-1, keepdim=True) / 448 * 2.0**-10
    bound = rows.float().abs() * 0.0626 + smallest * 1.001 + rounding(rows)
    assert ((got.float() - rows.float()).abs() <= bound).all()


@pytest.mark.parametrize(("encoding", "bound"), [("int8", 0.015), ("fp8", 0.035)])
def test_rows_of_normal_numbers_lose_little(encoding: str, bound: float) -> None:
    """Of head_dim 64. Not nothing either: a codec that did not round would not be one of 8 bits."""
    errors = row_errors(torch.randn(4, 2, 256, 64, generator=torch.Generator().manual_seed(1)), encoding)
    assert 0.1 * bound < errors.mean < errors.largest < bound


@pytest.mark.parametrize("encoding", LOSSY)
def test_zeros_stay_zeros(encoding: str) -> None:
    assert torch.equal(round_trip(torch.zeros(2, 2, 4, 16), encoding), torch.zeros(2, 2, 4, 16))


@pytest.mark.parametrize("encoding", LOSSY)
def test_what_was_rounded_once_is_not_rounded_again(encoding: str) -> None:
    """A block that was pulled and is published again by its reader does not drift."""
    once = round_trip(torch.randn(3, 2, 16, 64), encoding)
    twice = round_trip(once, encoding)
    assert torch.allclose(twice, once, rtol=1e-6, atol=0)


def test_fragments_of_a_batch_are_those_of_each_alone() -> None:
    rows = torch.randn(6, 2, 2, 5, 24)
    for encoding in KV_ENCODINGS:
        together = encode(rows, encoding)
        for i in range(6):
            assert torch.equal(together[i], encode(rows[i : i + 1], encoding)[0])


def test_scales_come_first_then_the_rows() -> None:
    """The format is what other workers read: it does not change unnoticed."""
    rows = torch.tensor([[[127.0, -254.0, 0.0, 2.0], [448.0, 1.0, -3.0, 0.5]]])
    int8, fp8 = encode(rows, "int8")[0], encode(rows, "fp8")[0]
    assert int8[:8].view(torch.float32).tolist() == [2.0, pytest.approx(448 / 127)]
    assert int8[8:12].view(torch.int8).tolist() == [64, -127, 0, 1]
    assert fp8[:8].view(torch.float32).tolist() == [pytest.approx(254 / 448), 1.0]
    assert fp8[12:].view(FP8).float().tolist() == [448.0, 1.0, -3.0, 0.5]
