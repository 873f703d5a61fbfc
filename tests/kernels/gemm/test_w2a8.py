"""The packed layout of ternary weights, and the assembly that decodes them, instruction by instruction."""

import pytest
import torch

from kernels.gemm.w2a8 import ASM, pack, unpack
from tests.kernels.ptx import execute

ALL_BYTES = torch.arange(-128, 128).to(torch.int8)


def test_a_number_is_64_times_itself():
    for i, assembly in enumerate(ASM):
        (out,) = execute(assembly, 1, (ALL_BYTES.view(torch.int32).long() & 0xFFFFFFFF).tolist())
        expected = ((ALL_BYTES.int() >> 2 * i & 3) ^ 2) - 2
        assert torch.equal(torch.tensor(out).to(torch.int32).view(torch.int8).int(), 64 * expected)


def test_unpacking_undoes_packing():
    weights = torch.randint(-2, 2, (5, 512), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed = pack(weights)
    assert packed.shape == (2, 5, 64)
    assert torch.equal(unpack(packed), weights)


def test_k_must_be_whole_blocks():
    with pytest.raises(ValueError, match="multiple of 256"):
        pack(torch.zeros(2, 384))
