"""The packed layout of 2:4 weights, and the assembly that spreads them out, instruction by instruction."""

import pytest
import torch

from kernels.gemm.sparse24 import ASM, pack, sparse24_gemm, unpack
from tests.kernels.ptx import execute, halves, pairs


def pruned(n, k, dtype=torch.bfloat16):
    """Keeps two of four, and now and then fewer."""
    generator = torch.Generator().manual_seed(n)
    weight = torch.randn(n, k // 4, 4, generator=generator).to(dtype)
    dropped = torch.rand(n, k // 4, 4, generator=generator).topk(2, dim=-1).indices
    weight.scatter_(-1, dropped, 0.0)
    weight[:, ::7, 1:] = 0.0
    return weight.flatten(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_unpacking_undoes_packing(dtype):
    weight = pruned(6, 1024, dtype)
    values, places = pack(weight)
    assert values.nbytes + places.nbytes == weight.nbytes * 9 // 16
    assert torch.equal(unpack(values, places, dtype), weight)
    x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.float() @ weight.float().T
    assert (sparse24_gemm(x, values, places).float() - expected).norm() <= 0.01 * expected.norm()


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match="multiple of 512"):
        pack(pruned(2, 256))
    with pytest.raises(ValueError, match="more than two"):
        pack(torch.ones(2, 512, dtype=torch.bfloat16))


def test_the_assembly_spreads_two_of_four():
    weight = pruned(1, 512)
    values, places = pack(weight)
    for i, assembly in enumerate(ASM):
        words = values[0, i, 0].long() & 0xFFFFFFFF
        four = execute(assembly, 4, words[::2].tolist(), words[1::2].tolist(), pairs(places[0, 0]))
        expected = weight[0, 128 * i : 128 * (i + 1)].view(32, 4)
        for place, out in enumerate(four):
            assert torch.equal(halves(out, torch.bfloat16), expected[:, place])
