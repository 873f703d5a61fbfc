"""`switchyard scale`: counts set by hand, and what it says of decisions in a real Redis."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy import cli
from deploy.autoscaling.memory import Memory
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
