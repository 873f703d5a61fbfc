"""`switchyard serve --model smollm2`, where `make smollm2` has installed it: a real model, on separate workers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from checkpoint.errors import CheckpointError
from checkpoint.gguf.packaged import packaged_gguf
from tests.deploy.serving import SWITCHYARD

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model_answers_from_separate_workers(dtype: str, tmp_path: Path) -> None:
    try:
        packaged_gguf("smollm2")
    except CheckpointError as error:
        pytest.skip(str(error))
    command = [SWITCHYARD, "serve", "--json", "--model", "smollm2", "--once", "The capital of France is"]
    for setting in ("endpoints.grpc_port=0", "endpoints.http_port=0", "ray.dashboard=false", f"model.dtype={dtype}"):
        command += ["--set", setting]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["text"].startswith(" Paris.")
    assert said["prefill_worker_id"] != said["decode_worker_id"]
    assert said["num_transferred_blocks"] == 1
