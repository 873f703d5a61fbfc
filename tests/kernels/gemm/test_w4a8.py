"""The packed layout of W4A8's weights, and the assembly that decodes them, instruction by instruction."""

import pytest
import torch

from kernels.gemm.w4a8 import SYMMETRIC_ASM, ZERO_ASM, pack, unpack
from tests.kernels.ptx import execute

ALL_BYTES = torch.arange(-128, 128).to(torch.int8)


def fours(tensor):
    return (tensor.view(torch.int32).long() & 0xFFFFFFFF).tolist()


def bytes_of(registers):
    return torch.tensor(registers).to(torch.int32).view(torch.int8).int()


def codes_in(i):
    return ((ALL_BYTES.int() >> 4 * i & 15) ^ 8) - 8


def test_a_code_is_16_times_itself():
    for i, assembly in enumerate(SYMMETRIC_ASM):
        (out,) = execute(assembly, 1, fours(ALL_BYTES))
        assert torch.equal(bytes_of(out), 16 * codes_in(i))


@pytest.mark.parametrize("zero", range(17))
def test_a_zero_point_is_taken_off(zero):
    shifted = torch.full((256,), 128 - zero, dtype=torch.uint8)
    for i, assembly in enumerate(ZERO_ASM):
        (out,) = execute(assembly, 1, fours(ALL_BYTES), fours(shifted))
        assert torch.equal(bytes_of(out), codes_in(i) + 8 - zero)


@pytest.mark.parametrize("lanes", [32, 64])
def test_unpacking_undoes_packing(lanes):
    codes = torch.randint(0, 16, (5, 256), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack(codes, lanes)
    assert packed.shape == (256 // (2 * lanes), 5, lanes)
    assert torch.equal(unpack(packed), codes)


def test_k_must_be_whole_blocks():
    with pytest.raises(ValueError, match="multiple of 128"):
        pack(torch.zeros(2, 192))
