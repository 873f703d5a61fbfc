"""What can be refused is refused before anything is started: exit code and one line."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from switchyard_client import GenerationRequest

from deploy import cli
from deploy.config import ROOT
from deploy.errors import StartError
from deploy.host import free_port
from tests.processes import RedisServer


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.run(arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("switchyard: ")
    assert captured.err.count("\n") == 1
    return code, captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["nonsense"], "No such command 'nonsense'"),
        (["serve", "--nonsense"], "No such option '--nonsense'"),
        (["serve", "--tp", "two"], "'two' is not a valid integer"),
        (["serve", "--set", "pools.decode.nonsense=1"], "pools.decode.nonsense: unknown key"),
        (["serve", "--set", "pools.decode.tp=1.5"], "pools.decode.tp: must be a valid integer"),
        (["serve", "--config", "no-such.yaml"], "no-such.yaml: No such file"),
        (["serve", "--model", "/no/such/model"], "/no/such/model: no such model directory"),
        (["serve", "--once", ""], "--once: the prompt must not be empty"),
        (["serve", "--mixed", "0", "--prefill", "0"], "need a mixed pool, or a prefill and a decode pool"),
        (["generate"], "Missing option '--prompt'"),
        (["generate", "--prompt", "x", "--seed", "-1"], "Invalid value for '--seed': -1 is not in the range 0<=x<="),
        (
            ["generate", "--prompt", "x", "--max-tokens", "9" * 20],
            "Invalid value for '--max-tokens': 9999999999999",
        ),
        (["generate", "--prompt", "x", "--target", ""], "--target: must be HOST:PORT, not ''"),
        (["generate", "--prompt", "x", "--target", "foo"], "--target: must be HOST:PORT, not 'foo'"),
        (["generate", "--prompt", "x", "--target", "h:1", "--target", "127.0.0.1:99999"], "not '127.0.0.1:99999'"),
        (["bench", "--target", "127.0.0.1:0"], "--target: must be HOST:PORT, not '127.0.0.1:0'"),
        (["bench", "--trace", "no-such.csv"], "no-such.csv: No such file"),
        (["bench", "--synthetic", "speed=9"], "--synthetic: 'speed=9' is not one of"),
        (["bench", "--trace", "a.csv", "--synthetic", "prompt=3"], "exclude each other"),
        (["bench", "--concurrency", "0"], "0 is not in the range"),
        (["quantize"], "Missing argument 'MODEL'"),
        (["quantize", "x"], "--out: where the compressed model goes must be given"),
        (["quantize", "/no/such/model", "--out", "x"], "/no/such/model: no such model directory"),
        (["quantize", "x", "--out", "y", "--method", "nonsense"], "--method 'nonsense' is not known (known: rtn, "),
        (["quantize", "x", "--plan", "--gpu", "z80"], "--gpu 'z80' is not known (known: a10, "),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, line = refusal(capsys, *arguments)
    assert code == 2
    assert message in line


def test_a_config_file_is_named_with_the_path_of_its_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("pools: {a: {role: mixed, max_num_seq: 3}}")
    code, line = refusal(capsys, "serve", "--config", str(path))
    assert code == 2
    assert line == f"switchyard: {path}: pools.a.max_num_seq: unknown key (did you mean max_num_seqs?)\n"


def test_heads_that_tp_does_not_divide(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = refusal(capsys, "serve", "--model", str(tiny_model), "--tp", "3")
    assert code == 2
    assert "tp=3 does not divide num_attention_heads=4" in line


def test_a_port_in_use(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        code, line = refusal(capsys, "serve", "--model", str(tiny_model), "--grpc-port", str(port), "--http-port", "0")
    assert code == 2
    assert f"endpoints.grpc_port: port {port} on 127.0.0.1 is in use" in line


def test_a_folder_for_the_arena_that_is_not_there(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ports = ["--grpc-port", "0", "--http-port", "0"]
    code, line = refusal(capsys, "serve", "--model", str(tiny_model), *ports, "--set", "kvstore.arena_dir=/no/such")
    assert (code, line) == (2, "switchyard: kvstore.arena_dir: /no/such: no such folder\n")


def test_a_control_redis_that_is_away(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    control = f"kvstore.control=redis://127.0.0.1:{free_port('127.0.0.1')}/0"
    ports = ["--grpc-port", "0", "--http-port", "0"]
    code, line = refusal(capsys, "serve", "--model", str(tiny_model), *ports, "--set", control)
    assert code == 1
    assert "kvstore.control" in line


def test_a_model_that_says_more_than_is_understood_does_not_start(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**raw, "sliding_window": 16}))
    code, line = refusal(capsys, "serve", "--model", str(model), "--grpc-port", "0", "--http-port", "0")
    assert code == 2
    assert f"{model}/config.json: sliding_window=16 is not supported: attention sees the whole context" in line


def test_a_tier_with_the_wrong_password_ends_the_start(
    tiny_model: Path, redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = redis_server.url.replace("redis://", "redis://somebody:wrong@")
    ports = ["--grpc-port", "0", "--http-port", "0"]
    code, line = refusal(capsys, "serve", "--model", str(tiny_model), *ports, "--set", f"kvstore.tier={wrong}")
    assert code == 2
    assert line.startswith("switchyard: kvstore.tier: Redis at 127.0.0.1:")
    assert "wrong@" not in line


def test_nobody_to_generate(capsys: pytest.CaptureFixture[str]) -> None:
    target = f"127.0.0.1:{free_port('127.0.0.1')}"
    code, line = refusal(capsys, "generate", "--target", target, "--prompt", "x")
    assert code == 1
    assert "UNAVAILABLE" in line


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    flags = (
        "--enable-lora --lora-modules --lora-root --max-loras --max-lora-rank --max-cpu-loras "
        "--config --model --prefill --decode --mixed --routers --tp --pp --set --grpc-port --http-port --once --json"
    )
    assert [flag for flag in flags.split() if flag not in text] == []


@pytest.mark.parametrize(("options", "temperature"), [([], None), (["--temperature", "0"], 0.0)])
def test_generate_leaves_the_temperature_to_the_model(
    monkeypatch: pytest.MonkeyPatch, options: list[str], temperature: float | None
) -> None:
    asked = []

    def complete(targets: object, request: GenerationRequest, out: object) -> object:
        asked.append(request)
        raise StartError("seen")

    monkeypatch.setattr(cli, "_complete", complete)
    assert cli.run(["generate", "--prompt", "x", *options]) != 0
    assert [one.sampling.temperature for one in asked] == [temperature]
    assert [one.model for one in asked] == [""]


def test_generate_may_name_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def complete(targets: object, request: GenerationRequest, out: object) -> object:
        asked.append(request)
        raise StartError("seen")

    monkeypatch.setattr(cli, "_complete", complete)
    assert cli.run(["generate", "--prompt", "x", "--model", "sql-lora"]) == 1
    assert [one.model for one in asked] == ["sql-lora"]


SHOW = """
import sys
from deploy import progress
progress.open_closed_streams()
with progress.own_stdout() as out:
    progress.deliver("answer", out)
    print("noise")
"""


def shell(line: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    arguments = ["bash", "-c", line, "bash", sys.executable, SHOW]
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_a_result_that_is_lost_is_a_failure() -> None:
    assert shell('"$1" -c "$2"').stdout == "answer"
    lost = shell('"$1" -c "$2" > /dev/full')
    assert lost.returncode == 1
    assert "DeployError: cannot write the result: No space left on device" in lost.stderr


def test_a_reader_that_is_gone_is_none() -> None:
    assert shell('{ "$1" -c "$2"; echo $? >&2; } | true').stderr.endswith("0\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_at_the_start(closed: str) -> None:
    assert shell(f'"$1" -c "$2" {closed}').returncode == 0


def test_a_current_folder_that_is_gone_is_refused(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    refused = shell('rmdir "$PWD"; "$1" -m deploy.cli serve --once x', cwd=gone)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "the current folder cannot be used: No such file or directory" in refused.stderr


@pytest.mark.parametrize("environment", ["LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0", "LC_ALL=C.UTF-8"])
def test_arguments_that_are_no_text_are_refused(environment: str) -> None:
    refused = shell(f"{environment} \"$1\" -m deploy.cli serve --once $'x \\xff'")
    assert refused.returncode == 2
    assert "'x \\udcff': not text in this locale's encoding" in refused.stderr


def test_schema_prints_the_schema_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["properties"]["kvstore"]["$ref"] == "#/$defs/KVStoreConfig"
    assert "zstd" in printed["$defs"]["KVStoreConfig"]["properties"]["disk_compression"]["description"]
