"""The same row gives the same bits, whatever its batch and its row in it, on the CPU and on a GPU."""

import pytest
import torch

from kernels.gemm import linear
from kernels.gemm.linear import fixed_order_linear, num_shares

SHAPES = [(64, 64), (48, 100), (33, 77), (257, 1000), (1, 64), (1024, 384), (5, 4096), (515, 17)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(num_tokens, n, k, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(n * 7919 + k)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((num_tokens, k), (n, k), (n,))]
    return [tensor.to(device, dtype) for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_row_alone_and_in_any_batch(n, k, dtype, threads):
    x, weight, bias = draw(50, n, k, dtype)
    whole = fixed_order_linear(x, weight, bias)
    for count in (1, 2, 7, 16, 17, 49):
        assert torch.equal(fixed_order_linear(x[:count], weight, bias), whole[:count])
    for row in (0, 15, 16, 31, 49):
        assert torch.equal(fixed_order_linear(x[row : row + 1], weight, bias), whole[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_row_at_any_index_beside_any_neighbours(n, k, dtype, threads):
    x, weight, _ = draw(linear.CPU_ROWS, n, k, dtype)
    alone = fixed_order_linear(x[:1], weight, None)
    everywhere = fixed_order_linear(x[:1].expand(linear.CPU_ROWS, k), weight, None)
    assert torch.equal(everywhere, alone.expand_as(everywhere))
    for shift in range(1, linear.CPU_ROWS, 3):
        neighbours = x.roll(shift, 0)
        neighbours[shift + 1 :] = float("inf")  # what stands beside a row must not reach it
        assert torch.equal(fixed_order_linear(neighbours, weight, None)[shift], alone[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_alignment_do_not_matter(dtype):
    x, weight, bias = draw(20, 130, 93, dtype)
    expected = fixed_order_linear(x, weight, bias)
    for offset in (1, 3, 8):
        wide = torch.zeros(20, 93 + 11, dtype=dtype)
        wide[:, offset : offset + 93] = x
        assert torch.equal(fixed_order_linear(wide[:, offset : offset + 93], weight, bias), expected)


def test_no_tokens():
    x, weight, bias = draw(1, 8, 16, torch.float32)
    assert fixed_order_linear(x[:0], weight, bias).shape == (0, 8)


def test_shares_follow_the_weight_alone():
    assert num_shares(4096, 14336, 128) == 4
    assert num_shares(6144, 4096, 128) == 2
    assert num_shares(28672, 4096, 128) == 1
    assert num_shares(64, 1024, 128) == 2
    assert num_shares(64, 1023, 128) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (6144, 4096), (1000, 1100), (33, 77)])
def test_on_the_gpu_a_split_and_an_unsplit_launch_give_the_same_bits(n, k, dtype):
    x, weight, bias = draw(300, n, k, dtype, "cuda")
    whole = fixed_order_linear(x, weight, bias)
    for begin, count in ((0, 1), (5, 16), (60, 64), (100, 128), (7, 129), (299, 1)):
        assert torch.equal(fixed_order_linear(x[begin : begin + count], weight, bias), whole[begin : begin + count])
