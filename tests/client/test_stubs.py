"""Generated stubs: as fresh as the contracts, and those of the client beside those of the cluster in one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import REPOSITORY, python_environment

FOLDERS = ("proto/gen", "client/switchyard_client/_stubs")


def files_under(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def test_stubs_are_what_make_proto_makes(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="switchyard[dev] is not installed")
    subprocess.run([sys.executable, str(REPOSITORY / "proto" / "make_stubs.py"), str(tmp_path)], check=True)
    for folder in FOLDERS:
        made = files_under(tmp_path / folder)
        assert len(made) > 3
        assert files_under(REPOSITORY / folder) == made, f"{folder} is not what its contracts say: run `make proto`"


@pytest.mark.parametrize("implementation", ["upb", "python"])
@pytest.mark.parametrize("first", ["switchyard.v1", "switchyard_client._stubs"])
def test_both_stubs_live_in_one_process(implementation: str, first: str) -> None:
    """protobuf has one pool of files a process, and takes a file twice only when its bytes are the same."""
    program = f"""
import importlib
importlib.import_module({first!r} + ".generation_pb2_grpc")
from switchyard.v1 import generation_pb2 as ours, generation_pb2_grpc, worker_pb2
from switchyard_client._stubs import generation_pb2 as theirs, generation_pb2_grpc
assert ours.DESCRIPTOR.serialized_pb == theirs.DESCRIPTOR.serialized_pb
sampling = ours.SamplingParams(seed=3)
request = theirs.GenerateRequest(text="x", sampling=sampling)
assert ours.GenerateRequest.FromString(request.SerializeToString()) == request
assert worker_pb2.Submit(sampling=theirs.SamplingParams(seed=3)).sampling == sampling
"""
    environment = {**python_environment(), "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": implementation}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
