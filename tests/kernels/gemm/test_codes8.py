"""The packed layout of 8-bit codes, and the assembly that decodes them, instruction by instruction."""

import pytest
import torch

from kernels.gemm.codes8 import ASSEMBLY, lanes_of, pack, unpack
from tests.kernels.ptx import execute, halves, pairs

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", [0, 1, 32, 127, 128, 255])
def test_every_code_is_exact(dtype, zero):
    low = torch.arange(256)
    words = (low | low.flip(0) << 8).to(torch.int16)
    zeros = torch.full((256,), zero + (1024 if dtype == torch.float16 else 0), dtype=dtype)
    for i, assembly in enumerate(ASSEMBLY[dtype]):
        (out,) = execute(assembly, 1, pairs(words), pairs(zeros))
        assert torch.equal(halves(out, dtype).int(), (low if i == 0 else low.flip(0)).int() - zero)


@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_unpacking_undoes_packing(group):
    codes = torch.randint(0, 256, (5, 256), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack(codes, lanes_of(group))
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed), codes)


def test_k_must_be_whole_blocks():
    with pytest.raises(ValueError, match="multiple of 128"):
        pack(torch.zeros(2, 192))
