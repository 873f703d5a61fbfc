"""Makes every gRPC channel of the cluster, and calls node processes. Knows nothing of the calls.

Components reach each other directly: a channel never goes through the proxy that http_proxy and its like name. Such a
proxy is for the way out of a network, and cannot reach 127.0.0.1 of this machine.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import grpc

Options: TypeAlias = Iterable[tuple[str, int]]

_TIMEOUT_S = 5.0  # a node answers in a millisecond; a starved machine is not a lost node

_DIRECT = (("grpc.enable_http_proxy", 0),)
NODE_OPTIONS = (
    # A node process comes back within a second or two; gRPC's own back-off would wait for up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 5000),  # despite its name: how long one attempt to connect may take
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
)
"""Of channels to node processes."""


CLUSTER_METADATA = "switchyard-cluster"
"""Key of the metadata by which a node knows its own cluster's callers."""


class ChannelClosed(Exception):
    """A call on a channel that this process has closed."""


NODE_ERRORS: tuple[type[Exception], ...] = (grpc.RpcError, ChannelClosed)
"""What call() and probe() raise."""


def dial(address: str, options: Options = NODE_OPTIONS) -> grpc.Channel:
    """A channel to HOST:PORT or unix:PATH; it connects when it is used."""
    return grpc.insecure_channel(address, options=[*_DIRECT, *options])


def dial_async(address: str, options: Options = NODE_OPTIONS) -> grpc.aio.Channel:
    """As dial, for an event loop."""
    return grpc.aio.insecure_channel(address, options=[*_DIRECT, *options])


def call(method: Callable[..., Any], request: object, cluster: str = "") -> Any:
    """One call; fails at once while the node is away. cluster: the caller's; a node of another one refuses it."""
    return _call(method, request, cluster, wait_for_ready=False)


def probe(method: Callable[..., Any], request: object, cluster: str = "") -> Any:
    """One call that waits a few seconds for the node to come.

    This is what connects anew after a loss: gRPC serves the socket of a connection in the making only while a call is
    waiting for it, and else looks after it every 5 seconds.
    """
    return _call(method, request, cluster, wait_for_ready=True)


def _call(method: Callable[..., Any], request: object, cluster: str, wait_for_ready: bool) -> Any:
    try:
        return method(
            request, timeout=_TIMEOUT_S, wait_for_ready=wait_for_ready, metadata=((CLUSTER_METADATA, cluster),)
        )
    except ValueError as error:  # how grpc says it
        raise ChannelClosed(str(error)) from error
