"""`python -m workers`: what is said when a worker cannot start."""

import json
import subprocess
import sys
from dataclasses import asdict

from safetensors.torch import load_file, save_file

from tests.workers.tiny_llama import make_checkpoint
from workers.config import EngineConfig, WorkerSpec


def test_the_rank_that_refuses_is_heard_not_the_one_that_dies_of_it(tmp_path):
    directory = make_checkpoint("gqa", tmp_path)
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]  # the second stage's
    save_file(weights, directory / "model.safetensors")
    spec = WorkerSpec("w", "mixed", "mixed", EngineConfig(str(directory), pp=2, num_blocks=8, device="cpu"))
    (tmp_path / "spec.json").write_text(json.dumps(asdict(spec)))
    command = [sys.executable, "-m", "workers", "--spec", tmp_path / "spec.json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "switchyard worker: " in ended.stderr
    assert "no tensor model.layers.2.mlp.up_proj.weight" in ended.stderr
