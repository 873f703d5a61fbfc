"""The node process from outside: its ready line, its end, what it leaves, and how it refuses to start."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.connect import open_directory
from tests.processes import REPOSITORY, KVNode, python_environment


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvstore.node", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=python_environment(), cwd=REPOSITORY, check=False
    )


def arguments_of(node: KVNode, **changed: str) -> list[str]:
    """The node's own arguments, some of them replaced: arguments_of(node, node_id="other")."""
    arguments = node.command()[3:]
    for name, value in changed.items():
        arguments[arguments.index("--" + name.replace("_", "-")) + 1] = value
    return arguments


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


def test_a_second_node_of_the_same_id_does_not_start(kv_node: KVNode) -> None:
    result = start(*arguments_of(kv_node))
    assert result.returncode == 1
    assert "live node process" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert kv_node.arena.exists()


def test_a_socket_in_use_is_left_alone(kv_node: KVNode, tmp_path: Path) -> None:
    result = start(*arguments_of(kv_node, node_id="other", arena=str(tmp_path / "other.arena")))
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
        result = start(*arguments_of(kv_node, node_id="other", control_address=address, **paths))
    assert result.returncode == 1
    assert f"kvstore.node: cannot listen on {address}" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "other.arena").exists()


def test_two_nodes_do_not_share_a_control_port(kv_node: KVNode, tmp_path: Path) -> None:
    paths = {"arena": str(tmp_path / "other.arena"), "host_address": f"unix:{tmp_path}/s"}
    result = start(*arguments_of(kv_node, node_id="other", **paths))
    assert result.returncode == 1
    assert f"cannot listen on {kv_node.control_address}" in result.stderr


def test_a_folder_that_is_missing_is_one_line(kv_node: KVNode, tmp_path: Path) -> None:
    result = start(*arguments_of(kv_node, node_id="other", arena=str(tmp_path / "missing" / "other.arena")))
    assert result.returncode == 1
    assert "No such file or directory" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("node_id", "a/b"),
        ("node_id", ""),
        ("slot_bytes", "0"),
        ("num_slots", "-1"),
        ("num_slots", "many"),
        ("host_address", "unix:/" + "x" * 200),
    ],
)
def test_bad_usage_exits_2_and_names_the_option(kv_node: KVNode, name: str, value: str) -> None:
    result = start(*arguments_of(kv_node, **{name: value}))
    assert result.returncode == 2
    assert "--" + name.replace("_", "-") in result.stderr.splitlines()[-1]
