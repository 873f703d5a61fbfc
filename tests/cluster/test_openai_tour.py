"""The tour of OpenAI's API by its stock client, in its second and its third major version."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_cluster import FakeCluster
from tests.fake_model import DEMO
from tests.fake_shape import Shape
from tests.forked import Prefork

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

REPOSITORY = Path(__file__).parents[2]
OPENAI_3 = REPOSITORY / ".venv" / "openai-3"  # `make env-test` puts it there


@pytest.fixture(scope="module")
def cluster(prefork: Prefork) -> Iterator[FakeCluster]:
    # In this mode a seed gives the same text whatever else runs.
    engine = {"runner": "torch", "batch_invariant": True, "max_num_seqs": 32}
    with FakeCluster(prefork, Shape(prefill=1, model_dir=str(DEMO), block_size=16, engine=engine)) as cluster:
        yield cluster


@pytest.mark.parametrize("major", [2, 3])
def test_the_tour(cluster: FakeCluster, major: int) -> None:
    if major == 3 and not OPENAI_3.is_dir():
        pytest.skip("openai 3 is not installed beside the environment: make env-test")
    environment = {**os.environ, "PYTHONPATH": str(OPENAI_3) if major == 3 else ""}
    command = [sys.executable, str(REPOSITORY / "examples" / "openai_tour.py"), f"{cluster.http_urls[0]}/v1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *features = done.stdout.splitlines()
    assert done.stdout.count("the same text") >= 5
    assert "another text" not in done.stdout
    assert first.startswith(f"openai {major}.")
    assert len(features) == 25
    assert "refused: tools" not in done.stdout  # the demo's template shows them
    assert "tools are refused" not in done.stdout
    print(done.stdout)
