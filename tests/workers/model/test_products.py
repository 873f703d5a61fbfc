"""The products that CUDA gets, computed by the operations' CPU twins: layouts, padding, scales and their order."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from kernels.gemm.codes4 import E2M1
from kernels.quantise import quantise
from workers.model.arithmetic import Arithmetic
from workers.model.loader import Checkpoint
from workers.model.products.choose import experts_of, linear_of
from workers.model.products.dense import DenseExperts
from workers.model.products.grouped_experts import GroupedExperts
from workers.model.quant.plain import PLAIN
from workers.model.quant.storage import Cut
from workers.model.quant.weights import (
    DenseWeight,
    GroupedWeight,
    InputChange,
    Int8Weight,
    LowRankWeight,
    Sparse24Weight,
)
from workers.model.weight_format import Quantised
from workers.parallel import ParallelGroups, Shard

CPU = Arithmetic(ParallelGroups(Shard(), torch.device("cpu")))
CUDA = SimpleNamespace(groups=SimpleNamespace(device=torch.device("cuda")), batch_invariant=False, product=CPU.product)
OUTPUTS = 24


def generator():
    return torch.Generator().manual_seed(1)


def grouped(inputs, group, *, bits=4, zeros=False, offsets=False, outputs=OUTPUTS, **options):
    shape = (outputs, inputs // group)
    return GroupedWeight(
        torch.randint(0, 2**bits, (outputs, inputs), generator=generator(), dtype=torch.uint8),
        torch.rand(shape, generator=generator()) * 0.1,
        bits,
        zeros=torch.randint(0, min(256, 2**bits + 1), shape, generator=generator(), dtype=torch.uint8)
        if zeros
        else None,
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


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("options", [{}, {"zeros": True}, {"offsets": True}], ids=["plain", "zeros", "offsets"])
def test_integers_of_other_widths(bits, group, options):
    check(grouped(384, group, bits=bits, **options), 384, f"W{bits}A16 g{group}")


@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("table", [E2M1, tuple(i**3 / 512 for i in range(-8, 8))], ids=["e2m1", "cubes"])
def test_tables_of_16_numbers(group, table):
    check(grouped(320, group, table=torch.tensor(table)), 320, f"W4A16 g{group}")


def test_inputs_in_another_order():
    order = torch.randperm(128, generator=generator())
    check(grouped(128, 32, inputs_change=InputChange(order)), 128, "W4A16 g32")


@pytest.mark.parametrize("group", [32, 64, 96, 192])
@pytest.mark.parametrize("zeros", [False, True])
def test_integers_of_4_bits_with_rows_of_8(group, zeros):
    weight = grouped(192, group, zeros=zeros, input_scheme="int8")
    check(weight, 192, f"W4A8 g{group}")
    assert linear_of([weight], torch.bfloat16, CUDA, None).input_scheme == (None if group in (64, 192) else "int8")


def test_rows_that_are_rounded_already():
    linear = linear_of([grouped(128, 32, input_scheme="int8")], torch.bfloat16, CUDA, None)
    x = torch.randn(3, 128, generator=generator()).bfloat16()
    rounded = Quantised(*quantise(x.float(), "int8"), "int8")
    assert torch.equal(linear(rounded), linear(x))


def int8(inputs, **options):
    codes = torch.randint(-127, 128, (OUTPUTS, inputs), generator=generator()).to(torch.int8)
    return Int8Weight(codes, torch.rand(OUTPUTS, generator=generator()) * 0.01, **options)


@pytest.mark.parametrize("inputs", [64, 70])
def test_large_inputs_are_multiplied_unrounded(inputs):
    weight = int8(inputs, outlier_threshold=6.0)
    check(weight, inputs, "W8A8 int with outliers")
    linear = linear_of([weight], torch.bfloat16, CUDA, None)
    assert linear.input_scheme is None
    x = torch.randn(4, inputs, generator=generator()).bfloat16()
    x[1, 7], x[2, 9] = 600.0, -30.0
    expected = x.float() @ weight.dense(torch.float32).T
    assert (linear(x).float() - expected).norm(dim=1).max() <= 0.02 * expected[0].norm() + 0.004 * expected[1].norm()
    rounded = linear_of([int8(inputs)], torch.bfloat16, CUDA, None)(x).float()
    assert (rounded - expected)[1].norm() > 2 * (linear(x).float() - expected)[1].norm()


@pytest.mark.parametrize("inputs", [256, 300])
def test_ternary_weights_take_2_bits(inputs):
    codes = torch.randint(-1, 2, (OUTPUTS, inputs), generator=generator()).to(torch.int8)
    weight = Int8Weight(codes, torch.rand(OUTPUTS, generator=generator()) * 0.1)
    check(weight, inputs, "W2A8 int")
    linear = linear_of([weight], torch.bfloat16, CUDA, None)
    assert linear.input_scheme == ("int8" if inputs == 256 else None)


EXPERT_OPTIONS = {
    "plain": {},
    "zeros": {"zeros": True},
    "table": {"table": torch.tensor(E2M1)},
    "offsets": {"offsets": True},
    "5 bits": {"bits": 5, "offsets": True},
    "6 bits": {"bits": 6},
}


@pytest.mark.parametrize("options", EXPERT_OPTIONS.values(), ids=EXPERT_OPTIONS)
@pytest.mark.parametrize("groups", [(32, 32), (64, 16)], ids=str)
def test_experts_of_4_bits(options, groups):
    hidden, width, count = 64, 48 if groups[1] == 16 else 96, 3
    gate_ups = [[grouped(hidden, groups[0], outputs=width, **options) for _ in range(2)] for _ in range(count)]
    gate_ups[1][0].codes.fill_(3)  # so that experts, gate and up differ
    gate_ups[2][1].scales.mul_(-0.5)
    downs = [grouped(width, groups[1], outputs=hidden, **options) for _ in range(count)]
    downs[1].scales.mul_(2.0)
    experts = experts_of(gate_ups, downs, torch.bfloat16, CUDA)
    assert isinstance(experts, GroupedExperts)
    x = torch.randn(7, hidden, generator=generator()).bfloat16()
    ids = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [-1, 1], [1, 0], [-1, -1]], dtype=torch.int32)
    weights = torch.rand(7, 2, generator=generator())
    dense = DenseExperts(
        torch.stack([torch.cat([half.dense(torch.float32) for half in halves]) for halves in gate_ups]),
        torch.stack([down.dense(torch.float32) for down in downs]),
    )
    expected = dense(x.float(), ids, weights)
    assert (experts(x, ids, weights).float() - expected).norm() <= 0.03 * expected.norm()


def test_experts_that_are_not_alike_are_dequantized():
    gate_ups = [[grouped(64, 32), grouped(64, 32)], [grouped(64, 32), grouped(64, 16)]]
    downs = [grouped(24, 8, outputs=64) for _ in range(2)]
    assert isinstance(experts_of(gate_ups, downs, torch.bfloat16, CUDA), DenseExperts)


def sparse24(inputs, outputs=OUTPUTS, dtype=torch.float32):
    values = torch.randn(outputs, inputs, generator=generator())
    fours = values.unflatten(1, (-1, 4))
    dropped = fours.abs().argsort(-1)[..., :2]
    fours.scatter_(-1, dropped, 0.0)
    fours[0, 0] = 0.0  # nothing is kept
    fours[1, 1] = torch.tensor([0.0, 0.0, 0.0, 2.0])
    return values.to(dtype)


@pytest.mark.parametrize("inputs", [512, 96])
def test_two_of_four_weights_are_read_where_a_device_can(inputs):
    values = sparse24(inputs)
    weight = Sparse24Weight.of(values)
    assert weight.kept.shape == (OUTPUTS, inputs // 2)
    assert torch.equal(weight.dense(torch.float32), values)
    check(weight, inputs, "2:4")
    on_cpu = linear_of([weight], torch.float32, CPU, None)
    assert on_cpu.kind == "2:4 dequantized to float32"
    x = torch.randn(5, inputs, generator=generator())
    torch.testing.assert_close(on_cpu(x), x @ values.T, rtol=1e-5, atol=1e-4)


def test_matrices_with_two_of_four_share_a_product():
    weights = [Sparse24Weight.of(sparse24(128, size)) for size in (8, 24)]
    linear = linear_of(weights, torch.bfloat16, CUDA, None)
    assert (linear.kind, linear.output_sizes) == ("2:4", [8, 24])
    x = torch.randn(5, 128, generator=generator()).bfloat16()
    expected = x.float() @ torch.cat([weight.dense(torch.float32) for weight in weights]).T
    assert (linear(x).float() - expected).norm() <= 0.02 * expected.norm()
    mixed = [weights[0], DenseWeight(torch.randn(16, 128, generator=generator()))]
    assert linear_of(mixed, torch.bfloat16, CUDA, None).kind == "2:4 and bfloat16"
    assert linear_of(mixed, torch.float32, CPU, None).kind == "2:4 dequantized to float32"


@pytest.mark.parametrize("at", [(0, 0), (17, 60)], ids=["first", "late"])
def test_weights_with_a_third_of_four_are_dense(at):
    values = sparse24(64)
    four = values[at[0], at[1] : at[1] + 4]
    four.copy_(torch.tensor([1.0, 0.0, 2.0, 3.0]))
    assert Sparse24Weight.of(values) is None
    assert Sparse24Weight.of(values[:, :63]) is None


@pytest.mark.parametrize("rank", [3, 16, 300])
def test_thin_pairs_are_two_products(rank):
    inputs, outputs = (64, OUTPUTS) if rank < 100 else (900, 700)
    left, right = (torch.randn(shape, generator=generator()) / 8 for shape in ((outputs, rank), (rank, inputs)))
    weight, bias = LowRankWeight(left, right), torch.randn(outputs, generator=generator())
    assert weight.is_thin
    x = torch.randn(5, inputs, generator=generator())
    expected = x @ (left @ right).T + bias
    for device, dtype, tolerance in (
        (CUDA, torch.bfloat16, 0.02),
        (CPU, torch.bfloat16, 0.02),
        (CPU, torch.float32, 1e-5),
    ):
        linear = linear_of([weight], dtype, device, bias.to(dtype))
        assert linear.kind == f"low rank {rank}"
        assert (linear(x.to(dtype)).float() - expected).norm() <= tolerance * expected.norm()


def test_pairs_that_are_not_thin_are_multiplied_out():
    left, right = torch.randn(OUTPUTS, 20, generator=generator()), torch.randn(20, 64, generator=generator())
    linear = linear_of([LowRankWeight(left, right)], torch.float32, CPU, None)
    assert linear.kind == "low rank 20 dequantized to float32"
    x = torch.randn(5, 64, generator=generator())
    torch.testing.assert_close(linear(x), x @ (left @ right).T, rtol=1e-5, atol=1e-4)


def test_pairs_beside_each_other_keep_their_order():
    weights = [
        LowRankWeight(torch.randn(size, 4, generator=generator()), torch.randn(4, 64, generator=generator()))
        for size in (24, 16)
    ]
    linear = linear_of(weights, torch.float32, CPU, None)
    assert linear.output_sizes == [24, 16]
    x = torch.randn(5, 64, generator=generator())
    expected = x @ torch.cat([weight.dense(torch.float32) for weight in weights]).T
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-4)


def test_a_plain_checkpoint_says_by_its_zeros_that_it_is_pruned(tmp_path):
    """Read whole and as a rank's share; by the engine's own reader."""
    values = sparse24(64, dtype=torch.bfloat16)
    other = torch.randn(8, 64, generator=generator()).bfloat16()
    save_file({"a.weight": values, "b.weight": other}, tmp_path / "model.safetensors")
    weights = Checkpoint(tmp_path, torch.bfloat16, torch.device("cpu"))
    for rows, columns in ((slice(0, 24), slice(0, 64)), (slice(12, 24), slice(32, 64))):
        read = PLAIN.read(weights, Cut("a", 24, 64, rows, columns))
        assert isinstance(read, Sparse24Weight)
        assert torch.equal(read.dense(torch.bfloat16), values[rows, columns])
    assert isinstance(PLAIN.read(weights, Cut("b", 8, 64, slice(0, 8), slice(0, 64))), DenseWeight)
