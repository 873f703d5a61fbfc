"""Deciding code can be imported, and simulated, without the machinery that carries it out."""

import subprocess
import sys

from tests.processes import REPOSITORY, python_environment


def test_deciding_modules_bring_no_machinery() -> None:
    program = """
import sys
import kvstore.blocks.block_log, kvstore.blocks.block_pools, kvstore.config, kvstore.control.directory, kvstore.names
import kvstore.tiers.host.slot_table
print(sorted(name for name in ("grpc", "numpy", "redis", "torch", "xxhash") if name in sys.modules))
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(
        command, capture_output=True, text=True, env=python_environment(), cwd=REPOSITORY, check=True
    )
    assert result.stdout.strip() == "[]"
