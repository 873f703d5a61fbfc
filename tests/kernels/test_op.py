"""The engine's view of the package: what it exports, where a call goes, and what importing it does not do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels.harness import OPS
from kernels.op import Op

ROOT = Path(__file__).parents[2]


def test_the_package_exports_the_operations_and_nothing_else():
    assert sorted(op.name for op in OPS) == sorted(kernels.__all__)
    assert all(getattr(kernels, op.name) is op for op in OPS)


def test_case_names_are_unique():
    for op in OPS:
        names = [case.name for case in op.small]
        assert len(set(names)) == len(names)
        names = [case.name for case in op.full]
        assert len(set(names)) == len(names)


def test_every_operation_has_cases_in_three_dtypes():
    for op in OPS:
        for cases in (op.small, op.full):
            assert {case.dtype for case in cases} == set(op.tolerance)


def test_every_operation_says_what_limits_it_in_one_line():
    for op in OPS:
        assert op.limit, op.name
        assert "\n" not in op.limit


class OnCuda(torch.Tensor):
    is_cuda = True


def test_a_call_goes_where_its_first_argument_is():
    op = Op(
        name="probe",
        reference=lambda x, y: "reference",
        launch=lambda x, y: f"triton {y}",
        cpu=lambda x, y: f"cpu {y}",
        cost=lambda x, y: None,
        small=(),
        full=(),
    )
    tensor = torch.zeros(1)
    assert op(tensor, 2) == "cpu 2"
    assert op(tensor.as_subclass(OnCuda), y=3) == "triton 3"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_costs_come_from_the_arguments_of_a_call(op):
    costs = [op.cost(*case.build("cpu")) for case in op.small]
    assert all(cost.memory_bytes > 0 and cost.flops >= 0 for cost in costs)


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_importing_touches_no_driver_and_no_gpu():
    done = run_python(
        "import kernels, torch\n"
        "from triton.runtime import driver\n"
        "assert driver._default is None and driver._active is None\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert done.returncode == 0, done.stderr


def test_cpu_paths_work_where_triton_has_no_wheel():
    done = run_python(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, kernels\n"
        "print(kernels.swiglu(torch.tensor([[0.0, 2.0, 5.0, 1.0]])).tolist())\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[[0.0, 1.76")
