"""The assembly that decodes 4-bit codes, instruction by instruction: no other lane without a GPU runs it."""

import pytest
import torch

from kernels.gemm.codes4 import E2M1, assembly, dequantise, lanes_of, pack, unpack
from tests.kernels.ptx import execute, halves, pairs

NF4 = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
NF4 += (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
DTYPES = [torch.bfloat16, torch.float16]


def words():
    """Every code in every place, beside random ones."""
    return torch.randint(-(2**15), 2**15, (600,), generator=torch.Generator().manual_seed(0)).to(torch.int16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", [0, 8, 16])
def test_integers_are_exact(dtype, zero):
    offset = 128 if dtype == torch.bfloat16 else 1024
    zeros = torch.full((600,), offset + zero, dtype=dtype)
    for i, one in enumerate(assembly(dtype, None)):
        (out,) = execute(one, 1, pairs(words()), pairs(zeros))
        assert torch.equal(halves(out, dtype).int(), (words() >> 4 * i & 15).int() - zero)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table", [E2M1, NF4, IQ4_NL], ids=["e2m1", "nf4", "iq4_nl"])
def test_tables_are_looked_up(dtype, table):
    pieces = assembly(dtype, tuple(map(float, table)))
    four = (
        [execute(one, 1, pairs(words()))[0] for one in pieces]
        if len(pieces) == 4
        else execute(*pieces, 4, pairs(words()))
    )
    for i, out in enumerate(four):
        expected = torch.tensor(table, dtype=dtype)[(words() >> 4 * i & 15).long()]
        assert torch.equal(halves(out, dtype).view(torch.int16), expected.view(torch.int16))


def test_e2m1_has_a_way_of_its_own():
    assert len(assembly(torch.bfloat16, E2M1)) == 4
    assert len(assembly(torch.bfloat16, NF4)) == 1


@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_codes_of_a_table_are_scaled_by_their_group(group):
    codes = torch.randint(0, 16, (5, 256), generator=torch.Generator().manual_seed(group), dtype=torch.uint8)
    packed = pack(codes, lanes_of(group))
    assert torch.equal(unpack(packed), codes)
    scales = torch.arange(1.0, 1 + 256 // group).view(-1, 1).expand(-1, 5).contiguous()
    expected = torch.tensor(NF4, dtype=torch.float64)[codes.long()] * scales.T.double().repeat_interleave(group, 1)
    assert torch.equal(dequantise(packed, scales, None, torch.float64, NF4), expected)
