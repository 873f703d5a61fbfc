"""`python -m workers`: how a worker starts and ends, and what is said when it cannot start."""

import json
import subprocess
import sys
from dataclasses import asdict

from safetensors.torch import load_file, save_file

from tests.workers.tiny_llama import make_checkpoint
from workers.config import EngineConfig, WorkerSpec


def test_a_bad_spec_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "spec.json").write_text('{"worker_id": "w", "tier_compression": "zstd"}')
    command = [sys.executable, "-m", "workers", "--spec", str(tmp_path / "spec.json")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr == f"switchyard worker: {tmp_path}/spec.json: tier_compression: unknown key\n"


def test_the_error_of_the_rank_that_refuses_is_reported_not_of_the_one_that_dies_of_it(tmp_path):
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


def test_a_worker_on_ipv6_in_a_folder_with_foreign_modules(tmp_path):
    """Neither the process nor its spawned ranks import what lies in the folder in which they are started."""
    directory = make_checkpoint("gqa", tmp_path)
    for name in ("workers", "kvstore", "redis", "grpc", "torch", "json", "multiprocessing", "numpy"):
        code = f"open({str(tmp_path / 'executed')!r}, 'a').write('{name} ')\nraise RuntimeError('the wrong {name}')\n"
        (tmp_path / f"{name}.py").write_text(code)
    engine = EngineConfig(str(directory), runner="fake", num_blocks=8, device="cpu")
    spec = WorkerSpec("w", "mixed", "mixed", engine, listen_host="::1")
    (tmp_path / "spec.json").write_text(json.dumps(asdict(spec)))
    command = [sys.executable, "-P", "-m", "workers", "--spec", str(tmp_path / "spec.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    line = process.stdout.readline()
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()
    assert json.loads(line or "{}").get("address", said).startswith("[::1]:"), said


def test_loading_leaves_no_team_of_openmp_behind(tmp_path):
    """With a second team there are more threads than cores, and those of the engine sleep after every operation."""
    engine = EngineConfig(str(make_checkpoint("gqa", tmp_path)), num_blocks=8, device="cpu", num_threads=2)
    (tmp_path / "spec.json").write_text(json.dumps(asdict(WorkerSpec("w", "mixed", "mixed", engine))))
    ended = subprocess.run(
        [sys.executable, "-c", _THREADS_AFTER_LOADING, tmp_path / "spec.json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    before, after = json.loads(ended.stdout)
    assert after == before + 1, "loaded in a thread that lives on, it leaves its team; else it does not"


_THREADS_AFTER_LOADING = """
import json, os, sys, threading, time
from pathlib import Path
from settings.loading import load
from workers.config import WorkerSpec
from workers.runtime.rank import Rank

def settled_count():
    counts = [-1]
    while len(counts) < 6 or len(set(counts[-5:])) > 1:  # a team ends after its thread
        time.sleep(0.1)
        counts.append(len(set(map(int, os.listdir("/proc/self/task"))) - {t.native_id for t in threading.enumerate()}))
    return counts[-1]

ranks = [Rank(load(WorkerSpec, Path(sys.argv[1])), 0) for _ in range(3)]
ranks[0].connect()  # what torch starts once
counts = []
ranks[1].connect()
counts.append(settled_count())
ranks[2]._connect("", "")
print(json.dumps([*counts, settled_count()]))
"""
