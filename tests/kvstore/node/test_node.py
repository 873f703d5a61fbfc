"""The node process from outside: its ready line, its end, what it leaves, and how it refuses to start."""

import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from kvstore.connect import open_directory
from tests.processes import REPOSITORY, KVNode, python_environment


def start(folder: Path, spec: Mapping[str, object]) -> subprocess.CompletedProcess[str]:
    """A node process that is expected to end by itself."""
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    result = subprocess.run(
        [sys.executable, "-m", "kvstore.node", "--spec", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        env=python_environment(),
        cwd=REPOSITORY,
        check=False,
    )
    path.unlink()
    return result


def test_ready_line(kv_node: KVNode) -> None:
    assert kv_node.ready == {
        "host_address": kv_node.host_address,
        "control_address": kv_node.control_address,
        "peer_address": "",
        "arena": str(kv_node.arena),
        "pid": kv_node.pid,
    }


def test_sigterm_removes_its_files(kv_node: KVNode) -> None:
    socket_path = Path(kv_node.host_address.removeprefix("unix:"))
    assert kv_node.arena.exists()
    assert socket_path.exists()
    assert kv_node.terminate() == 0
    assert not kv_node.arena.exists()
    assert not socket_path.exists()


def test_a_killed_node_is_replaced_in_place(kv_node: KVNode) -> None:
    kv_node.kill()
    assert kv_node.arena.exists()
    kv_node.start()
    assert kv_node.terminate() == 0
    assert not kv_node.arena.exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_port_0_is_replaced_by_the_port_it_got(kv_node: KVNode, host: str) -> None:
    kv_node.kill()
    kv_node.control_address = f"{host}:0"
    kv_node.start()
    address = str(kv_node.ready["control_address"])
    assert address.startswith(f"{host}:")
    assert int(address.rpartition(":")[2]) > 0
    directory = open_directory(f"memory://{address}", "")
    assert directory.workers() == []
    directory.close()


def test_a_second_node_of_the_same_id_does_not_start(kv_node: KVNode, tmp_path: Path) -> None:
    result = start(tmp_path, kv_node.spec())
    assert result.returncode == 1
    assert "live node process" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert kv_node.arena.exists()


def test_a_socket_in_use_is_left_alone(kv_node: KVNode, tmp_path: Path) -> None:
    result = start(tmp_path, {**kv_node.spec(), "node_id": "other", "arena": str(tmp_path / "other.arena")})
    assert result.returncode == 1
    assert "another process listens on" in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert Path(kv_node.host_address.removeprefix("unix:")).exists()


def test_a_port_in_use_is_one_line(kv_node: KVNode, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        paths = {"arena": str(tmp_path / "other.arena"), "host_address": f"unix:{tmp_path}/s"}
        result = start(tmp_path, {**kv_node.spec(), "node_id": "other", "control_address": address, **paths})
    assert result.returncode == 1
    assert f"kvstore.node: cannot listen on {address}" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "other.arena").exists()


def test_two_nodes_do_not_share_a_control_port(kv_node: KVNode, tmp_path: Path) -> None:
    paths = {"arena": str(tmp_path / "other.arena"), "host_address": f"unix:{tmp_path}/s"}
    result = start(tmp_path, {**kv_node.spec(), "node_id": "other", **paths})
    assert result.returncode == 1
    assert f"cannot listen on {kv_node.control_address}" in result.stderr


def test_a_folder_that_is_missing_is_one_line(kv_node: KVNode, tmp_path: Path) -> None:
    arena = str(tmp_path / "missing" / "other.arena")
    result = start(tmp_path, {**kv_node.spec(), "node_id": "other", "arena": arena})
    assert result.returncode == 1
    assert "No such file or directory" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("node_id", "a/b", "node_id: must be 1 to 200 letters, digits, dots, - and _, not 'a/b'"),
        ("node_id", "", "node_id: must be 1 to 200 letters"),
        ("slot_bytes", 0, "slot_bytes: must be more than 0, not 0"),
        ("num_slots", -1, "num_slots: must be more than 0, not -1"),
        ("num_slots", "many", "num_slots: must be a valid integer, not the text 'many'"),
        ("host_address", "unix:/" + "x" * 200, "host_address: longer than 107 bytes"),
        ("disk_compression", "zstd", "disk_compression: unknown key"),
        (
            "kvstore",
            {"disk_compresion": "zstd"},
            "kvstore.disk_compresion: unknown key (did you mean disk_compression?)",
        ),
        ("secret", 12345678, "secret: must be a valid string"),
    ],
)
def test_a_bad_spec_exits_2_and_names_the_key(
    kv_node: KVNode, tmp_path: Path, name: str, value: object, message: str
) -> None:
    result = start(tmp_path, {**kv_node.spec(), name: value})
    assert result.returncode == 2
    assert f"kvstore.node: {tmp_path}/spec.json: {message}" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "12345678" not in result.stderr


def test_a_node_needs_its_spec() -> None:
    command = [sys.executable, "-m", "kvstore.node"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=python_environment(), check=False)
    assert result.returncode == 2
    assert "--spec" in result.stderr
