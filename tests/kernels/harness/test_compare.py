"""The comparison itself: it must see what a wrong kernel does."""

import dataclasses

import pytest
import torch

from kernels.harness import OPS
from kernels.harness.compare import GuardedEmpty, case_error, row_error

SWIGLU = next(op for op in OPS if op.name == "swiglu")
CASE = SWIGLU.small[0]


def allocate(gate_up):
    return torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype)


def right(gate_up):
    return allocate(gate_up).copy_(SWIGLU.cpu(gate_up))


def leaves_the_last_element(gate_up):
    out = allocate(gate_up)
    out.view(-1)[:-1] = SWIGLU.cpu(gate_up).view(-1)[:-1]
    return out


def writes_one_too_many(gate_up):
    out = right(gate_up)
    out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()
    return out


def writes_one_too_early(gate_up):
    out = right(gate_up)
    out.as_strided((1,), (1,), out.storage_offset() - 1).zero_()
    return out


def writes_a_nan_behind_its_last_row(gate_up):
    out = right(gate_up)
    out.as_strided((1,), (1,), out.storage_offset() + out.numel() + out.shape[1] - 1).fill_(float("nan"))
    return out


def spoils_its_input(gate_up):
    out = right(gate_up)
    gate_up[0, 0] += 1
    return out


def reads_behind_its_input(gate_up):
    return right(gate_up) + gate_up.as_strided((1,), (1,), gate_up.storage_offset() + gate_up.numel())


def gets_one_row_wrong(gate_up):
    out = right(gate_up)
    out[1] *= 1.001
    return out


def test_a_right_result_passes():
    assert case_error(SWIGLU, CASE, right, "cpu") <= 1e-6


@pytest.mark.parametrize(
    "wrong",
    [
        leaves_the_last_element,
        writes_one_too_many,
        writes_one_too_early,
        writes_a_nan_behind_its_last_row,
        spoils_its_input,
        reads_behind_its_input,
        gets_one_row_wrong,
    ],
)
def test_a_wrong_result_does_not(wrong):
    assert case_error(SWIGLU, CASE, wrong, "cpu") > SWIGLU.tolerance[CASE.dtype]


def test_a_wrong_dtype_or_shape_does_not_pass():
    out = torch.ones(2, 3)
    assert row_error(out, out) == 0
    assert row_error(out.double(), out) == float("inf")
    assert row_error(out[:1], out) == float("inf")


def test_the_guards_leave_integers_alone():
    with GuardedEmpty() as guarded:
        assert torch.empty(3, dtype=torch.int32).dtype == torch.int32
        assert torch.empty(3).isnan().all()
    assert guarded.guards_are_intact()


def test_cases_are_the_same_values_each_time():
    for op in OPS:
        first, second = (op.small[0].build("cpu") for _ in range(2))
        tensors = [(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, torch.Tensor)]
        assert all(torch.equal(*(x.contiguous().view(torch.uint8) for x in pair)) for pair in tensors)
        assert all(a.data_ptr() != b.data_ptr() for a, b in tensors)


def test_an_operation_may_have_a_tolerance_of_its_own():
    strict = dataclasses.replace(SWIGLU, tolerance={torch.float32: 0.0})
    assert strict.tolerance[torch.float32] == 0.0
    assert SWIGLU.tolerance[torch.float32] > 0.0
