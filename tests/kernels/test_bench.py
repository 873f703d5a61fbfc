"""The GPU benchmark, rehearsed on the CPU: the same code path over small cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.harness import OPS
from kernels.harness.bench import known_rows, table
from kernels.harness.peers import PEERS
from kernels.harness.timing import Ceilings, num_sets_for

ROOT = Path(__file__).resolve().parents[2]


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
                if got.shape != want.shape:  # a peer may keep heads and tokens in another order
                    got = got.squeeze(0).transpose(0, 1) if op.name == "prefill_attention" else got.reshape(want.shape)
                assert torch.allclose(got, want, rtol=1e-4, atol=1e-4), (op.name, case.name)
                num_compared += 1
    assert num_compared >= 5


def test_a_floor_is_the_larger_of_moving_and_computing():
    ceilings = Ceilings("a device", copy_bytes_per_s=1e12, gemm_flops_per_s=1e15)
    assert ceilings.floor_s(10**9, 10**9) == pytest.approx(1e-3)
    assert ceilings.floor_s(1, 10**12) == pytest.approx(1e-3)
    assert num_sets_for(1 << 20, "cuda") == 32
    assert num_sets_for(100 << 20, "cuda") == 2
    assert num_sets_for(1 << 30, "cuda") == 1


def test_a_failure_has_its_line_in_the_table():
    assert "| swiglu | x | failed: boom |" in table([{"op": "swiglu", "case": "x", "failure": "boom"}])
