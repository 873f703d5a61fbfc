"""Greedy tokens through gRPC and a whole cluster equal transformers', for a pairwise selection of settings.

Every pair of values of (prefix caching, chunk size, memory) occurs, each with several splits, disaggregated and mixed.
One cluster is Ray's, and so is the one of tests/deploy/test_cluster.py; Ray takes 20 s to start what is forked in two.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from switchyard_client import Finished

from tests import greedy
from tests.deploy.conftest import write_tiny_model
from tests.fake_cluster import FakeCluster
from tests.processes import python_environment

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
MANY, FEW = 200, 24  # KV blocks of 16 tokens; the prompts and their completions need 36


@dataclass(frozen=True)
class Case:
    """One cluster: pools as (role, tp, pp), and their options."""

    pools: tuple[tuple[str, int, int], ...]
    caching: bool
    chunk: int
    num_blocks: int

    @property
    def name(self) -> str:
        pools = "-".join(f"{role}{tp}x{pp}" for role, tp, pp in self.pools)
        return f"{pools}-{'cache' if self.caching else 'nocache'}-chunk{self.chunk}-{self.num_blocks}blocks"

    @property
    def engine(self) -> dict[str, object]:
        """The options of all its engines."""
        return {
            "max_num_batched_tokens": self.chunk,
            "num_blocks": self.num_blocks,
            "enable_prefix_caching": self.caching,
        }

    def options(self) -> list[str]:
        """Arguments of `switchyard serve`."""
        roles = [role for role, _, _ in self.pools]
        options = [part for role in roles for part in (f"--{role}", "1")]
        for role, tp, pp in self.pools:
            for key, value in {"tp": tp, "pp": pp, **self.engine}.items():
                options += ["--set", f"pools.{role}.{key}={json.dumps(value)}"]
        return options

    def shape(self, model: Path) -> dict[str, object]:
        """Of a cluster of forked processes."""
        return {
            **dict.fromkeys(("prefill", "decode", "mixed"), 0),
            **dict.fromkeys((role for role, _, _ in self.pools), 1),
            "routers": 1,
            "block_size": 16,
            "model_dir": str(model),
            "engine": {"runner": "torch", **self.engine},
            "engine_of": {role: {"tp": tp, "pp": pp} for role, tp, pp in self.pools},
        }


CASES = [
    Case((("prefill", 1, 1), ("decode", 2, 1)), caching=True, chunk=37, num_blocks=FEW),
    Case((("prefill", 2, 1), ("decode", 1, 1)), caching=False, chunk=512, num_blocks=FEW),
    Case((("prefill", 1, 2), ("decode", 2, 1)), caching=True, chunk=512, num_blocks=MANY),
    Case((("prefill", 2, 1), ("decode", 1, 2)), caching=False, chunk=37, num_blocks=MANY),
    Case((("mixed", 1, 2),), caching=False, chunk=37, num_blocks=MANY),
]
RAY_CASE = Case((("mixed", 2, 1),), caching=True, chunk=512, num_blocks=FEW)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    return greedy.expected(model)


@contextmanager
def serve(model: Path, options: list[str]) -> Iterator[str]:
    """A cluster on free ports; yields the gRPC address of its router."""
    command = [sys.executable, "-m", "deploy.cli", "serve", "--json", "--model", str(model), *options]
    for setting in ("endpoints.grpc_port=0", "endpoints.http_port=0", "ray.dashboard=false"):
        command += ["--set", setting]
    environment = {**python_environment(), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=ROOT, text=True)
    try:
        line = process.stdout.readline()
        assert line, "serve ended before it was ready"
        yield json.loads(line)["endpoints"]["routers"][0]["grpc"]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_greedy_tokens_equal_transformers(
    case: Case, model: Path, expected: list[list[int]], fake_cluster: Callable[..., FakeCluster]
) -> None:
    results = greedy.ask_all_at_once(fake_cluster(**case.shape(model)).targets[0])
    check(case, results, expected)


def test_greedy_tokens_of_a_whole_cluster_of_ray(model: Path, expected: list[list[int]]) -> None:
    with serve(model, RAY_CASE.options()) as target:
        results = greedy.ask_all_at_once(target)
    check(RAY_CASE, results, expected)


def check(case: Case, results: list[tuple[list[int], Finished]], expected: list[list[int]]) -> None:
    """The right tokens, and each prompt token computed once."""
    assert [tokens for tokens, _ in results] == expected
    if case.pools[0][0] == "prefill":
        for length, (_, finished) in zip(greedy.LENGTHS, results, strict=True):
            assert finished.stats.num_recomputed_prompt_tokens == 0
            assert finished.stats.num_transferred_blocks >= -(-length // 16)
            if case.num_blocks == MANY:
                assert finished.stats.num_computed_prompt_tokens == length
