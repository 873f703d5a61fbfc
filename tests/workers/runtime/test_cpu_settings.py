"""Large tensors lie on huge pages where the kernel allows them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import python_environment

_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SCRIPT = """
import re
from pathlib import Path
import torch
from workers.runtime.cpu_settings import prepare_cpu
prepare_cpu(1)
weights = torch.ones(64 << 20, dtype=torch.uint8)
print(torch.get_num_threads(), *re.findall(r"AnonHugePages: *(\\d+) kB", Path("/proc/self/smaps_rollup").read_text()))
"""


def in_huge_pages_kib(**environment: str) -> int:
    command = [sys.executable, "-c", _SCRIPT]
    shown = subprocess.run(
        command, env={**python_environment(), **environment}, capture_output=True, text=True, check=True
    )
    num_threads, kib = map(int, shown.stdout.split())
    assert num_threads == 1
    return kib


@pytest.mark.skipif(not _MODE.is_file() or "[never]" in _MODE.read_text(), reason="the kernel gives no huge pages")
def test_weights_lie_on_huge_pages_unless_the_user_says_no() -> None:
    assert in_huge_pages_kib() >= 32 << 10
    assert in_huge_pages_kib(THP_MEM_ALLOC_ENABLE="0") == 0 or "[always]" in _MODE.read_text()
