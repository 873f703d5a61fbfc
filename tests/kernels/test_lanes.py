"""The Triton code of every operation, in three lanes: interpreted, compiled for Hopper on paper, and on a GPU.

Triton decides at import whether it interprets, so each lane is one child process that prints a JSON line per case;
the cases are known here beforehand, and each is a test.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.harness import OPS, static_table
from kernels.harness.lanes import sources_digest

ROOT = Path(__file__).parents[2]
PAPER_BASELINE = Path(__file__).with_name("paper_baseline.jsonl")
LANE_TIMEOUT_S = 1200  # a minute on an idle machine; a third of a core may be all there is
STATIC_TABLE = ROOT / "kernels" / "STATIC.md"
REGENERATE = f"python -m kernels.harness.lanes paper > {PAPER_BASELINE.relative_to(ROOT)}"


def keyed(lines):
    records = [json.loads(line) for line in lines.splitlines()]
    return {(record["op"], record["case"]): record for record in records}


PARTS = 4  # a lane's operations in so many processes, as many at a time as there are test workers


def part_of(op, of=PARTS):
    return f"{OPS.index(op) % of}/{of}"


@functools.cache
def baseline():
    return keyed(PAPER_BASELINE.read_text())


IS_UNCHANGED = {record["sources"] for record in baseline().values()} == {sources_digest()}


def is_enough(lane_name, op, case):
    """Whether this case stands for others. Code that is unchanged compiles to the same, so a few operations show that
    the lane works; and it computes the same, so one case of each operation is interpreted. Else all cases are run."""
    if lane_name == "paper":
        return IS_UNCHANGED and op in OPS[:4] and case is op.full[0]
    return lane_name == "interpreter" and IS_UNCHANGED and case is op.small[0]


@functools.cache
def lane(name, part, first=False):
    environment = {**os.environ, "TRITON_INTERPRET": str(int(name == "interpreter")), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kernels.harness.lanes", name, "--part", part, *["--first"] * first]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LANE_TIMEOUT_S)
    return keyed(done.stdout), done.stderr


def result(name, op, case):
    is_first = is_enough(name, op, case)
    records, stderr = lane(name, part_of(op, of=len(OPS) if is_first and name == "paper" else PARTS), is_first)
    assert (op.name, case.name) in records, f"the {name} lane said nothing of this case:\n{stderr[-2000:]}"
    record = records[op.name, case.name]
    assert "failure" not in record, record["failure"]
    return record


def cases(lane_name, *kinds):
    return [
        pytest.param(
            op,
            case,
            id=f"{op.name} {case.name}",
            marks=[
                pytest.mark.xdist_group(f"{lane_name} lane {part_of(op)}"),
                pytest.mark.timeout(LANE_TIMEOUT_S + 60),
                *[pytest.mark.slow] * (IS_UNCHANGED and lane_name != "gpu" and not is_enough(lane_name, op, case)),
            ],
        )
        for op in OPS
        for kind in kinds
        for case in getattr(op, kind)
    ]


@pytest.mark.parametrize(("op", "case"), cases("interpreter", "small"))
def test_interpreted(op, case):
    record = result("interpreter", op, case)
    assert record["error"] <= record["tolerance"]


@pytest.mark.parametrize(("op", "case"), cases("paper", "full"))
def test_compiled_for_hopper(op, case):
    kernels = result("paper", op, case)["kernels"]
    assert kernels
    committed = baseline()[op.name, case.name]["kernels"]
    assert [kernel["name"] for kernel in kernels] == [kernel["name"] for kernel in committed]
    for kernel, before in zip(kernels, committed, strict=True):
        assert kernel["shared_bytes"] <= 232_448
        assert kernel["local_bytes"] == 0, "it spills"
        assert kernel["registers"] <= 1.1 * before["registers"], f"if this is meant: {REGENERATE}"
    for instruction in case.sass:
        assert any(instruction in kernel["sass"] for kernel in kernels), f"no {instruction}: {kernels}"


def test_the_committed_static_table_is_that_of_the_baseline():
    assert STATIC_TABLE.read_text() == static_table.render(baseline().values()), (
        f"python -m kernels.harness.static_table {PAPER_BASELINE.relative_to(ROOT)} > {STATIC_TABLE.relative_to(ROOT)}"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels' GPU lane did not run")
@pytest.mark.parametrize(("op", "case"), cases("gpu", "small", "full"))
def test_on_the_gpu(op, case):
    record = result("gpu", op, case)
    assert record["error"] <= record["tolerance"]


def test_a_lane_refuses_the_wrong_kind_of_process():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "kernels.harness.lanes", "paper"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1
    assert "TRITON_INTERPRET=0" in done.stderr


def test_production_shapes_can_be_left_out():
    command = [sys.executable, "-m", "kernels.harness.lanes", "paper", "--small", "--only", "swiglu"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # this lane has no others


def test_a_case_that_fails_to_run_is_reported_and_the_others_still_run():
    code = (
        "import dataclasses, sys\n"
        "from kernels.harness import lanes\n"
        "def broken(*arguments): raise ValueError('on purpose')\n"
        "broken_op = lambda op: dataclasses.replace(op, launch=broken) if op.name == 'rms_norm' else op\n"
        "lanes.OPS = tuple(map(broken_op, lanes.OPS))\n"
        "sys.argv = ['lanes', 'interpreter', '--only', 'rms_norm fp32']\n"
        "lanes.main()\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 1
    failures = {op: record.get("failure") for (op, _), record in keyed(done.stdout).items()}
    assert failures.pop("rms_norm") == "ValueError: on purpose"
    assert failures["add_rms_norm"] is None
    assert set(failures.values()) == {None}
