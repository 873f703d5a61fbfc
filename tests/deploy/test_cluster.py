"""One real cluster for the whole module, its workers cut differently: prefill in two stages, decode in two columns."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from switchyard_client import GenerationError, GenerationRequest, SamplingParams

from deploy.actors.metrics import exported_names
from deploy.completion import Completion, complete
from kvstore.config import NodeSpec
from settings.loading import load
from telemetry import node, worker
from telemetry.metric import Kind
from tests import greedy
from tests.processes import python_environment

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "def walk(tree):\n    for name in sorted(tree):\n        yield name, tree[name]\n\n\nclass Node:\n    def"
T = TypeVar("T")


@dataclass
class Running:
    """The `switchyard serve` process, and what it printed when it was ready."""

    process: subprocess.Popen[bytes]
    said: dict[str, Any]

    @property
    def router(self) -> dict[str, Any]:
        return self.said["endpoints"]["routers"][0]

    def generate(self, prompt: str = PROMPT, max_tokens: int = 12, on_text: Callable[[str], None] = str) -> Completion:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        request = GenerationRequest(prompt, sampling, deadline_s=240.0)
        return complete(self.router["grpc"], request, on_text)

    def processes(self, pattern: str) -> list[psutil.Process]:
        """Processes below `serve` whose command line matches."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if re.search(pattern, " ".join(child.cmdline())):
                    found.append(child)
            except psutil.Error:
                continue
        return found

    def get(self, url: str) -> str:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=20) as answer:
            return str(answer.read().decode())


def eventually(attempt: Callable[[], T | None], what: str, timeout_s: float = 240.0) -> T:
    """The first result that is not None; a refused or broken request counts as none."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            result = attempt()
        except (GenerationError, urllib.error.URLError, OSError) as error:
            result, what = None, f"{what.split(' (', maxsplit=1)[0]} ({error})"
        if result is not None:
            return result
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    environment = {**python_environment(), "OMP_NUM_THREADS": "1"}
    settings = ("endpoints.grpc_port=0", "endpoints.http_port=0", "pools.decode.tp=2", "pools.prefill.pp=2")
    settings += ("router.replacement_wait_s=180",)  # a slow machine takes its time to start a group again
    settings += ("kvstore.disk_bytes=16777216", f"kvstore.disk_dir={tmp_path_factory.mktemp('disk')}")
    command = [sys.executable, "-m", "deploy.cli", "serve", "--json", "--model", str(tiny_model)]
    command += [part for setting in settings for part in ("--set", setting)]
    errors = (tmp_path_factory.mktemp("serve") / "stderr").open("w+b")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, cwd=ROOT)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        errors.seek(0)
        assert line, f"serve ended: {errors.read().decode()}"
        yield Running(process, json.loads(line))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        process.stdout.close()
        errors.close()


def test_the_sample_went_from_prefill_to_decode(cluster: Running) -> None:
    said = cluster.said
    assert said["num_output_tokens"] > 0
    assert said["num_transferred_blocks"] >= 1
    assert said["num_recomputed_prompt_tokens"] == 0
    assert said["num_computed_prompt_tokens"] == said["num_prompt_tokens"]
    assert said["prefill_worker_id"].startswith("prefill-")
    assert said["decode_worker_id"].startswith("decode-")
    assert said["ttft_s"] > 0


def test_greedy_tokens_equal_transformers(cluster: Running, tiny_model: Path) -> None:
    results = greedy.ask_all_at_once(cluster.router["grpc"])
    assert [tokens for tokens, _ in results] == greedy.expected(tiny_model)
    for length, (_, finished) in zip(greedy.LENGTHS, results, strict=True):
        assert finished.stats.num_computed_prompt_tokens == length
        assert finished.stats.num_recomputed_prompt_tokens == 0
        assert finished.stats.num_transferred_blocks == -(-length // 16)


def test_grpc_and_http_give_the_same(cluster: Running) -> None:
    over_grpc = cluster.generate()
    assert over_grpc.num_output_tokens == 12
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://{cluster.router['http']}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        over_http = json.loads(answer.read())
    assert over_http["choices"][0]["text"] == over_grpc.text


def test_metrics_come_out_of_rays_port(cluster: Running) -> None:
    before = cluster.generate("import os\n\n\ndef one(two, three):\n    return")
    assert before.num_output_tokens == 12
    quiet = {
        "cached_prompt_tokens",
        "recomputed_prompt_tokens",
        "dropped_write_back_blocks",
        "preemptions",
        "swaps",
        "recomputes",
        "moved_requests",
        "prefixes_fetched",
        "prefixes_recomputed",
    }
    seen = [m for m in worker.RAY_METRICS if m.name not in {f"switchyard_worker_{name}_total" for name in quiet}]
    wanted = {name for metric in seen for name in exported_names(metric)}
    wanted |= {f"ray_{metric.name}" for metric in node.METRICS if metric.kind is Kind.GAUGE}

    def values(text: str, name: str, label: str = "") -> list[float]:
        found = re.findall(rf"^ray_switchyard_{name}{{(.*)}} (\S+)$", text, re.MULTILINE)
        return [float(value) for labels, value in found if label in labels]

    def scrape() -> str | None:
        text = cluster.get(cluster.said["endpoints"]["metrics"])
        generated = [
            sum(values(text, "worker_generated_tokens_total", f'pool="{pool}"')) for pool in ("prefill", "decode")
        ]
        is_whole = wanted <= set(re.findall(r"^(ray_switchyard_\w+)", text, re.MULTILINE))
        return text if is_whole and generated[0] >= 1 and generated[1] >= 11 else None

    text = eventually(scrape, "all metrics")
    for pool in ("prefill", "decode"):
        assert values(text, "worker_free_blocks", f'worker="{pool}-')[0] > 0
    assert values(text, "node_sealed_slots", "node=")[0] > 0
    assert values(text, "node_disk_up") == [1.0]


def test_the_dashboards_serve_page_shows_healthy_pools(cluster: Running) -> None:
    page = json.loads(cluster.get(f"{cluster.said['endpoints']['dashboard']}/api/serve/applications/"))
    assert {name: application["status"] for name, application in page["applications"].items()} == {
        "prefill": "RUNNING",
        "decode": "RUNNING",
    }
    for name, application in page["applications"].items():
        assert application["deployments"][name]["status"] == "HEALTHY"
        assert [replica["state"] for replica in application["deployments"][name]["replicas"]] == ["RUNNING"]


@pytest.mark.parametrize(
    ("pool", "number"), [("decode", signal.SIGKILL), ("prefill", signal.SIGKILL), ("prefill", signal.SIGSTOP)]
)
def test_a_rank_that_is_killed_or_stopped_brings_its_group_back(cluster: Running, pool: str, number: int) -> None:
    # Fresh ones: a prompt that was seen before does not need the prefill pool.
    prompts = [f"# {pool} {number} {i}\n{PROMPT}" for i in range(1000)]
    before = cluster.generate(prompts[0])
    lost = worker_of(before, pool)
    # The rank that only follows: neither the leader nor the replica gets a signal.
    pid = rank_pids(cluster)[f"{lost} rank 1"]
    os.kill(pid, number)

    fresh_prompts = iter(prompts[1:])

    def served_by_another() -> Completion | None:
        found = cluster.generate(next(fresh_prompts))
        worker = worker_of(found, pool)
        return found if worker.startswith(f"{pool}-") and worker != lost else None

    after = eventually(served_by_another, f"a new {pool} worker")
    assert not psutil.pid_exists(pid)
    assert cluster.generate(prompts[0]).text == before.text
    group = {f"{worker_of(after, pool)} rank {rank}" for rank in (0, 1)}

    def only_the_new_group() -> bool | None:  # the dashboard learns of it a little later
        return {name for name in rank_pids(cluster) if name.startswith(f"{pool}-")} == group or None

    eventually(only_the_new_group, "the dashboard to show the new ranks alone")
    fresh = eventually(lambda: moved(cluster.generate(next(fresh_prompts))), "a transfer to or from it")
    assert fresh.stats.num_recomputed_prompt_tokens == 0


def moved(completion: Completion) -> Completion | None:
    return completion if completion.stats.num_transferred_blocks else None


def worker_of(completion: Completion, pool: str) -> str:
    """The pool's worker that had a part in a completion."""
    return completion.stats.decode_worker_id if pool == "decode" else completion.stats.prefill_worker_id


def rank_pids(cluster: Running) -> dict[str, int]:
    """Processes of the living ranks, by the name that the dashboard shows."""
    page = json.loads(cluster.get(f"{cluster.said['endpoints']['dashboard']}/logical/actors"))
    actors = page["data"]["actors"].values()
    return {a["reprName"]: a["pid"] for a in actors if a["actorClass"] == "RankActor" and a["state"] == "ALIVE"}


def test_a_killed_kv_node_comes_back(cluster: Running) -> None:
    (node,) = cluster.processes(r"-m kvstore\.node ")
    os.kill(node.pid, signal.SIGKILL)
    prompts = iter(f"# attempt {n}\n{PROMPT}" for n in range(10_000))
    after = eventually(lambda: moved(cluster.generate(next(prompts))), "KV blocks that move again")
    assert after.stats.num_recomputed_prompt_tokens == 0
    assert [found.pid for found in cluster.processes(r"-m kvstore\.node ")] != [node.pid]


@pytest.mark.parametrize("victim", ["router", "decode"])
def test_a_stream_goes_on_when_a_process_is_killed_under_it(cluster: Running, victim: str) -> None:
    undisturbed = eventually(lambda: moved(cluster.generate(f"# {victim}\n{PROMPT}", max_tokens=100)), "a transfer")
    if victim == "router":
        (router,) = cluster.processes(r"-m router --spec ")
        pid = router.pid
    else:
        pid = rank_pids(cluster)[f"{undisturbed.stats.decode_worker_id} rank 1"]
    num_tokens = 0

    def kill_in_the_middle(text: str) -> None:
        nonlocal num_tokens
        num_tokens += 1
        if num_tokens == 5:
            os.kill(pid, signal.SIGKILL)

    killed = cluster.generate(f"# {victim}\n{PROMPT}", 100, kill_in_the_middle)
    assert num_tokens > 5
    assert killed.token_ids == undisturbed.token_ids
    assert killed.text == undisturbed.text
    if victim == "router":
        (again,) = cluster.processes(r"-m router --spec ")
        assert again.pid != pid
    else:
        assert killed.stats.num_replacements == 1


def test_ctrl_c_ends_all_that_was_started(cluster: Running) -> None:
    """Last: the cluster is gone after it."""
    children = psutil.Process(cluster.process.pid).children(recursive=True)
    (node,) = cluster.processes(r"-m kvstore\.node ")
    spec = load(NodeSpec, node.cmdline()[-1])
    arena, sockets = spec.arena, Path(spec.host_address.removeprefix("unix:"))
    assert spec.secret  # of the disk tier
    assert cluster.processes(re.escape(spec.secret)) == []  # in no command line
    assert Path(node.cmdline()[-1]).stat().st_mode & 0o777 == 0o600
    assert arena.exists()
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.process.wait(60) == 0
    _, alive = psutil.wait_procs(children, timeout=30)
    assert [process.cmdline() for process in alive] == []
    assert not arena.exists()
    assert not sockets.parent.exists()
