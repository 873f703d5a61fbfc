"""Channels reach this machine whatever proxy the environment names."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tests.processes import free_port, python_environment

CALL = """
import asyncio, sys
from kvstore.network.channels import dial, dial_async

async def call_async():
    async with dial_async(sys.argv[1]) as channel:
        return await channel.unary_unary("/any/Method")(b"x", timeout=10)

with dial(sys.argv[1], ()) as channel:
    print(channel.unary_unary("/any/Method")(b"x", timeout=10) + asyncio.run(call_async()))
"""


class _Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda request, _: request)


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "grpc_proxy"])
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_dead_proxy_is_not_asked(name: str, host: str) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((_Echo(),))
    port = server.add_insecure_port(f"{host}:0")
    server.start()
    environment = {**python_environment(), name: f"http://127.0.0.1:{free_port()}", "no_proxy": ""}
    command = [sys.executable, "-c", CALL, f"{host}:{port}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    server.stop(0)
    assert done.stdout == "b'xx'\n", done.stderr
