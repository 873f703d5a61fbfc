"""`switchyard scale`: counts set by hand, and what it says of decisions in a real Redis."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy import cli
from deploy.autoscaling.memory import Memory
from planner.scaling.config import AutoscalingConfig
from planner.scaling.decide import ScalingState, decide
from planner.scaling.observation import Observation, PoolObservation
from planner.scaling.record import DecisionRecord, Start
from tests.processes import RedisServer

pytestmark = pytest.mark.redis


@pytest.fixture
def config_file(redis_server: RedisServer, tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        f"name: c\nkvstore: {{control: '{redis_server.url}'}}\nautoscaling: {{mode: act}}\n"
        "pools:\n"
        "  prefill: {role: prefill}\n"
        "  decode: {role: decode, replicas: 2, min_replicas: 1, max_replicas: 4}\n"
    )
    return path


def scale(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Exit code, and all that was printed."""
    code = cli.run(["scale", "--config", str(path), *options])
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        ("decode=0", "decode must be a number from 1 (min_replicas) to 4 (max_replicas), not '0'"),
        ("decode=5", "decode must be a number from 1 (min_replicas) to 4 (max_replicas), not '5'"),
        ("prefill=2", "prefill must be a number from 1 (min_replicas) to 1 (max_replicas), not '2'"),
        (f"decode={'9' * 5000}", "decode must be a number from 1 (min_replicas) to 4 (max_replicas), not '999"),
        ("decode=-1", "decode must be a number from 1 (min_replicas) to 4 (max_replicas), not '-1'"),
        ("decode", "decode must be a number from 1 (min_replicas) to 4 (max_replicas), not ''"),
        ("other=2", "there is no pool 'other', only prefill, decode"),
    ],
)
def test_a_count_that_the_pool_cannot_have_is_refused(
    config_file: Path, redis_server: RedisServer, capsys: pytest.CaptureFixture[str], pin: str, message: str
) -> None:
    code, said = scale(config_file, capsys, "--pin", pin)
    assert (code, said.startswith(f"switchyard: --pin: {message}")) == (2, True), said
    assert Memory(redis_server.url, "c").pins() == {}


def test_a_count_is_set_and_left_again(
    config_file: Path, redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = Memory(redis_server.url, "c")
    assert scale(config_file, capsys, "--pin", "decode=4") == (0, "decode: 4 workers, by hand\n")
    assert memory.pins() == {"decode": 4}
    code, said = scale(config_file, capsys, "--pin", "decode=3", "--set", "autoscaling.mode=advise")
    assert (code, said) == (0, "decode: 3 workers, by hand (autoscaling.mode is advise: nobody sees to it)\n")
    assert scale(config_file, capsys, "--unpin", "decode") == (0, "decode: left to the policy\n")
    assert memory.pins() == {}


def decide_once(memory: Memory) -> None:
    observed = Observation((PoolObservation(name="decode", role="decode", num_ready=2, max_workers=4),))
    config = AutoscalingConfig(mode="act", policy="fixed")
    plan, after, explanation = decide(observed, ScalingState(), 1e9, config)
    memory.write(Start(config, ScalingState()), DecisionRecord(1e9, observed, plan, explanation), after)


def test_decisions_whose_start_is_gone_are_shown_and_not_made_again(
    config_file: Path, redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = Memory(redis_server.url, "c")
    nothing = "no decision is kept: none was made yet, or Redis was emptied since\n"
    assert scale(config_file, capsys, "--explain") == (0, nothing)
    decide_once(memory)
    assert "1 decisions made again, 0 came out differently" in scale(config_file, capsys, "--replay")[1]
    with redis_server.client() as client:
        client.ltrim("switchyard:autoscaler1:c:decisions", 1, -1)  # what an emptied Redis has after one more decision
    code, said = scale(config_file, capsys, "--explain")
    assert (code, said.startswith("plan 1 at 2001-09-09")) == (0, True)
    code, said = scale(config_file, capsys, "--replay")
    assert (code, said.startswith("switchyard: no decision can be made again: the line with which")) == (1, True)
    decide_once(memory)
    code, said = scale(config_file, capsys, "--replay")
    assert (code, "1 decisions made again" in said, "the first 1 lines have no start" in said) == (0, True, True), said


def test_a_redis_that_is_away_is_named(
    config_file: Path, redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    redis_server.kill()
    for options in (["--explain"], ["--pin", "decode=2"]):
        code, said = scale(config_file, capsys, *options)
        assert (code, said.startswith("switchyard: kvstore.control: Redis cannot be reached: 127.0.0.1:")) == (1, True)
