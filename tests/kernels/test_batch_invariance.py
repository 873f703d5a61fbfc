"""Batch-invariant attention: on the CPU's own path, in Triton's interpreter, and on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.attention.cases import Options
from kernels.cases import PagedShape
from tests.kernels.invariant_attention import checks, differing, draw

ROOT = Path(__file__).parents[2]
KINDS = {
    "plain": Options(batch_invariant=True),
    "window and sinks": Options(batch_invariant=True, window=50, sinks=True, soft_cap=20.0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_token_has_the_same_bits_whatever_is_beside_it(dtype, kind):
    sequences = draw(PagedShape((300, 1, 130, 37, 128), 6, 2, 32, 16), dtype, KINDS[kind], "cpu", lambda op: op.cpu)
    names = []
    for name, pairs in checks(sequences, [1, 7, 64, 100]):
        names.append(name)
        assert differing(pairs) == 0, name
    assert "decode and prefill" in names


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_matrix_library_has_no_choice_at_real_head_sizes(head_dim):
    sequences = draw(
        PagedShape((200, 131), 8, 2, head_dim, 64), torch.float32, KINDS["plain"], "cpu", lambda op: op.cpu
    )
    for name, pairs in checks(sequences, [5]):
        assert differing(pairs) == 0, name


def test_without_the_mode_the_batch_shows():
    """Else the tests above would prove nothing."""
    plain = Options()
    sequences = draw(PagedShape((300, 1, 130, 37, 128), 6, 2, 32, 16), torch.float32, plain, "cpu", lambda op: op.cpu)
    assert sum(differing(pairs) for _, pairs in checks(sequences, [7])) > 0


def child(device, interpret):
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("invariant_attention.py"), device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_invariant(records):
    """Between decode and prefill the kernels promise nothing: their tiles run on different instructions."""
    promised = [record for record in records if not record["check"].startswith("decode and prefill")]
    assert len(promised) >= 12
    assert {record["check"]: record["wrong"] for record in promised if record["wrong"]} == {}


def test_interpreted():
    assert_invariant(child("cpu", "1"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: invariance of the kernels was not shown")
def test_on_the_gpu():
    assert_invariant(child("cuda", "0"))
