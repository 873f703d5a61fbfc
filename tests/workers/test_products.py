"""The products that CUDA gets, computed by the operations' CPU twins: layouts, padding, scales and their order."""

from types import SimpleNamespace

import pytest
import torch

from kernels.gemm.codes4 import E2M1
from workers.model.products.choose import linear_of
from workers.model.quant.weights import GroupedWeight, InputChange

CUDA = SimpleNamespace(groups=SimpleNamespace(device=torch.device("cuda")), batch_invariant=False)
OUTPUTS = 24


def generator():
    return torch.Generator().manual_seed(1)


def grouped(inputs, group, *, zeros=False, offsets=False, **options):
    shape = (OUTPUTS, inputs // group)
    return GroupedWeight(
        torch.randint(0, 16, (OUTPUTS, inputs), generator=generator(), dtype=torch.uint8),
        torch.rand(shape, generator=generator()) * 0.1,
        4,
        zeros=torch.randint(0, 17, shape, generator=generator(), dtype=torch.uint8) if zeros else None,
        offsets=torch.randn(shape, generator=generator()) if offsets else None,
        **options,
    )


def check(weight, inputs, kind, tolerance=0.02, num_rows=5):
    bias = torch.randn(OUTPUTS, generator=generator()).bfloat16()
    linear = linear_of([weight], torch.bfloat16, CUDA, bias)
    assert linear.kind == kind
    x = torch.randn(num_rows, inputs, generator=generator()).bfloat16()
    expected = x.float() @ weight.dense(torch.float32).T + bias.float()
    assert (linear(x).float() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("group", [16, 32, 48, 64, 192])
@pytest.mark.parametrize("options", [{}, {"zeros": True}, {"offsets": True}], ids=["plain", "zeros", "offsets"])
def test_integers_of_4_bits(group, options):
    check(grouped(192, group, **options), 192, f"W4A16 g{group}")


@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("table", [E2M1, tuple(i**3 / 512 for i in range(-8, 8))], ids=["e2m1", "cubes"])
def test_tables_of_16_numbers(group, table):
    check(grouped(320, group, table=torch.tensor(table)), 320, f"W4A16 g{group}")


def test_inputs_in_another_order():
    order = torch.randperm(128, generator=generator())
    check(grouped(128, 32, inputs_change=InputChange(order)), 128, "W4A16 g32")
