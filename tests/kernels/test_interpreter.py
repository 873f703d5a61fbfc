"""The repaired interpreter computes bf16 and fp8 by value; without that the interpreter lane proves nothing there."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKS = [
    *(f"bf16 {name}" for name in ("add", "sub", "mul", "neg", "maximum", "less", "fma", "abs", "sum and max")),
    *("float32 to bfloat16", "float16 to bfloat16", "bfloat16 to float32", "bfloat16 to float16"),
    *("float32 to float8_e4m3fn", "float32 to float8_e5m2", "bfloat16 to float8_e4m3fn", "float8_e4m3fn to float32"),
    *("float8_e5m2 to float16", "float8_e4m3fn to bfloat16", "float32 to float16"),
    *("bfloat16 dot", "float8_e4m3fn dot"),
]


@functools.cache
def checks():
    script = Path(__file__).with_name("interpreter_arithmetic.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return {record["check"]: record for record in map(json.loads, done.stdout.splitlines())}


def test_the_checks_are_all_listed():
    assert sorted(checks()) == sorted(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_by_value(check):
    record = checks()[check]
    assert record["of"] >= 8
    assert record["wrong"] == 0


def test_the_repair_is_refused_where_triton_compiles():
    code = "from kernels.harness.interpret import repair; repair()"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode != 0
    assert "TRITON_INTERPRET=1" in done.stderr
