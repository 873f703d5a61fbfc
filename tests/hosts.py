"""Hosts of one machine: network, process and mount namespaces, each with a /dev/shm of its own, and wires between."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

import psutil
import pytest

_MAKE_HOST = "mount -t tmpfs -o size=1g tmpfs /dev/shm && ip link set lo up && echo ready && exec sleep infinity"


class Host:
    """Namespaces that live as long as their first process; when it is killed, all that runs in them is."""

    def __init__(self) -> None:
        namespaces = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._process = subprocess.Popen(["unshare", *namespaces, "sh", "-c", _MAKE_HOST], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        (first,) = psutil.Process(self._process.pid).children()
        self.pid = first.pid

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line that runs another one in here."""
        return ["nsenter", "-t", str(self.pid), "--net", "--mount", "--pid", "--", *arguments]

    def run(self, *arguments: str) -> str:
        """Run to its end; what it printed."""
        return subprocess.run(self.command(arguments), check=True, stdout=subprocess.PIPE, text=True).stdout

    def close(self) -> None:
        """Everything in here ends."""
        psutil.Process(self.pid).kill()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()


def require(condition: bool, what: str) -> None:
    """Skip, or in CI fail, unless the machine has what it takes."""
    if not condition:
        if os.environ.get("CI") == "true":
            pytest.fail(what)
        pytest.skip(what)


@contextlib.contextmanager
def wired_hosts(addresses: Sequence[str]) -> Iterator[list[Host]]:
    """Hosts with these addresses of one /24, all on a bridge in the first one."""
    require(os.geteuid() == 0, "network namespaces need root")
    require(all(shutil.which(tool) for tool in ("ip", "unshare", "nsenter")), "no ip, unshare or nsenter")
    with contextlib.ExitStack() as stack:
        made = []
        for _ in addresses:
            made.append(Host())
            stack.callback(made[-1].close)
        first = made[0]
        first.run("ip", "link", "add", "lan", "type", "bridge")
        first.run("ip", "address", "add", f"{addresses[0]}/24", "dev", "lan")
        first.run("ip", "link", "set", "lan", "up")
        first.run("ip", "route", "add", "default", "dev", "lan")  # a pod has one, and by it Ray finds its address
        for number, (host, address) in enumerate(zip(made[1:], addresses[1:], strict=True)):
            ends = f"ip link add wire{number} netns {first.pid} type veth peer name wire netns {host.pid}"
            subprocess.run(ends.split(), check=True)
            first.run("ip", "link", "set", f"wire{number}", "master", "lan", "up")
            host.run("ip", "address", "add", f"{address}/24", "dev", "wire")
            host.run("ip", "link", "set", "wire", "up")
            host.run("ip", "route", "add", "default", "via", addresses[0])
        yield made
