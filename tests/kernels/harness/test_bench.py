"""The GPU benchmark, rehearsed on the CPU: the same code path over small cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.harness import OPS
from kernels.harness.bench import describe, known_rows, newest_rows, reached, selected, table
from kernels.harness.peers import PEERS
from kernels.harness.timing import Ceilings, measure_ceilings, num_sets_for
from kernels.op import Target

ROOT = Path(__file__).resolve().parents[3]


def rehearse(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kernels.harness.bench", "--device", "cpu", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def test_rows_are_written_once_and_known_ones_are_passed_over(tmp_path):
    first = rehearse("--out", str(tmp_path), "--only", "fp32")
    assert first.returncode == 0, first.stdout + first.stderr
    lines = (tmp_path / "kernels.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["op"] for row in rows} == {op.name for op in OPS if torch.float32 in op.tolerance}
    for row in rows:
        assert row["share_of_ceiling"] > 0
        assert row["us"] > 0
        assert row["error"] <= row["tolerance"]
    whole_prompt = next(row for row in rows if row["op"] == "prefill_attention")
    assert whole_prompt["peers_us"]["torch sdpa, contiguous"] > 0
    again = rehearse("--out", str(tmp_path / "elsewhere"), "--known", str(tmp_path), "--only", "fp32")
    assert again.returncode == 0
    assert (tmp_path / "elsewhere" / "kernels.jsonl").read_text() == ""
    assert again.stdout.count("| swiglu |") == first.stdout.count("| swiglu |") > 0  # the table has them all the same


def test_a_wrong_result_is_a_failure_and_is_tried_again(tmp_path):
    code = (
        "import dataclasses, sys\n"
        "from kernels.harness import bench\n"
        "wrong = lambda gate_up: gate_up[:, : gate_up.shape[1] // 2] * 2\n"
        "bench.OPS = tuple(dataclasses.replace(op, cpu=wrong) if op.name == 'swiglu' else op for op in bench.OPS)\n"
        f"sys.argv = ['bench', '--device', 'cpu', '--out', {str(tmp_path)!r}, '--only', 'swiglu fp32']\n"
        "bench.main()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 1
    assert "failed: error" in done.stdout
    assert known_rows([tmp_path / "kernels.jsonl"]) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_line_says_how_to_rehearse(tmp_path):
    command = [sys.executable, "-m", "kernels.harness.bench", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 2
    assert "no CUDA device; --device cpu rehearses" in done.stderr


def test_peers_compute_what_we_compute():
    torch.manual_seed(0)
    num_compared = 0
    for op in OPS:
        for case in op.small:
            for peer in PEERS.get(op.name, {}).values():
                call = peer(*case.build("cpu"))
                if call is None or case.dtype != torch.float32:
                    continue
                want = op.reference(*case.build("cpu"))
                got = call()
                if isinstance(want, tuple):  # of several results the first will do: the others follow from it
                    want, got = want[0], got[0]
                if got.shape != want.shape:  # a peer may keep heads and tokens in another order
                    got = got.squeeze(0).transpose(0, 1) if op.name == "prefill_attention" else got.reshape(want.shape)
                assert torch.allclose(got, want, rtol=1e-4, atol=1e-4), (op.name, case.name)
                num_compared += 1
    assert num_compared >= 5


def test_a_floor_is_the_larger_of_moving_and_computing():
    ceilings = Ceilings("a device", copy_bytes_per_s=1e12, gemm_flops_per_s=1e15)
    assert ceilings.floor_s(10**9, 10**9) == pytest.approx(1e-3)
    assert ceilings.floor_s(1, 10**12) == pytest.approx(1e-3)
    assert ceilings.floor_s(1, 10**12, "fp8") == pytest.approx(1e-3)  # not measured: the rate of bf16
    measured = Ceilings("a device", copy_bytes_per_s=1e12, gemm_flops_per_s=1e15, fp8_flops_per_s=2e15)
    assert measured.floor_s(1, 10**12, "fp8") == pytest.approx(0.5e-3)
    assert num_sets_for(1 << 20, "cuda") == 32
    assert num_sets_for(100 << 20, "cuda") == 2
    assert num_sets_for(1 << 30, "cuda") == 1


def test_a_failure_has_its_line_in_the_table():
    assert "| swiglu | x | failed: boom |" in table([{"op": "swiglu", "case": "x", "failure": "boom"}])


def test_the_ceilings_of_narrow_products_are_measured_where_torch_has_them():
    ceilings = measure_ceilings("cpu")
    assert ceilings.gemm_flops_per_s > 0
    assert ceilings.int8_ops_per_s > 0  # torch multiplies int8 on every CPU
    assert 0 <= ceilings.fp8_flops_per_s < float("inf")


@pytest.mark.parametrize(
    ("target", "words", "share"),
    [
        (Target(0.9, "memory"), "90% of the memory", 0.5 / 0.9),
        (Target(0.5, "gemm"), "50% of the gemm", 0.2 / 0.5),
        (Target(800, "TFLOP/s"), "800 TFLOP/s", 0.5),
        (Target(2.5, "us"), "at most 2.5 us", 0.25),
        (Target(1.0, "peer"), "100% of the fastest peer", 0.8),
    ],
)
def test_a_target_is_met_from_one_on(target, words, share):
    ceilings = Ceilings("a device", copy_bytes_per_s=4e12, gemm_flops_per_s=1e15, fp8_flops_per_s=2e15)
    row = {"us": 10.0, "bytes_per_s": 2e12, "flops_per_s": 4e14, "unit": "fp8", "peers_us": {"a": 8.0, "b": 9.0}}
    assert describe(target) == words
    assert reached(target, row, ceilings) == pytest.approx(share)


def test_without_a_peer_a_peers_target_is_neither_met_nor_missed():
    row = {"us": 10.0, "peers_us": {}}
    assert reached(Target(1.0, "peer"), row, Ceilings("a device", 1e12, 1e15)) is None


def test_on_a_gpu_every_operation_has_its_first_target_before_any_has_its_second():
    order = selected("cuda", "")
    assert len(order) == len({(op.name, case.name) for op, case in order})
    targets = [case.target is not None for _, case in order]
    assert targets == sorted(targets, reverse=True)
    with_targets = {op.name for op, case in order if case.target is not None}
    assert {op.name for op, _ in order[: len(with_targets)]} == with_targets
    assert {op.name for op, _ in order} == {op.name for op in OPS}


def row_of(case, us, **fields):
    ceilings = {"device": "a GPU", "copy_bytes_per_s": 4e12, "gemm_flops_per_s": 8e14}
    figures = {"us": us, "bytes_per_s": 2e12, "flops_per_s": 1e12, "share_of_ceiling": 0.5, "peers_us": {"torch": 7.0}}
    return {"op": "swiglu", "case": case, "ceilings": ceilings, **figures, **fields}


def test_the_table_of_committed_rows_has_the_newest_of_each_case(tmp_path):
    rows = [row_of("x", 9.0), row_of("y", 5.0), row_of("x", 8.0, target="at most 10 us", reached=1.25)]
    assert [row["us"] for row in newest_rows(rows)] == [8.0, 5.0]
    (tmp_path / "kernels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "kernels.harness.bench", "--table", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "a GPU: copy 4.000 TB/s, GEMM 800.00 TFLOP/s" in done.stdout
    assert "| swiglu | x | 8.0 | 2.00 | 1.0 | 50% | at most 10 us | yes | torch 7.0 |" in done.stdout
    assert "9.0" not in done.stdout


def test_the_table_says_what_was_missed():
    missed = row_of("x", 20.0, target="at most 10 us", reached=0.5)
    assert "| at most 10 us | no, 50% of it |" in table([missed])
    assert "| no peer |" in table([row_of("x", 20.0, target="100% of the fastest peer", reached=None)])
