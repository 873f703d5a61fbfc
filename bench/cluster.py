"""A whole cluster for a benchmark, started as a user starts it."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """A running cluster's addresses."""

    grpc: str
    http: str


@contextmanager
def cluster(*options: str) -> Iterator[Target]:
    """`switchyard serve` with these options on ports of its own choice, until the block ends."""
    ports = ["--set", "endpoints.grpc_port=0", "--set", "endpoints.http_port=0"]
    command = [sys.executable, "-P", "-m", "deploy.cli", "serve", "--json", *ports, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        if not said:
            raise SystemExit(f"switchyard bench: {shlex.join(command)} did not start")
        router = json.loads(said)["endpoints"]["routers"][0]
        yield Target(router["grpc"], router["http"])
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
