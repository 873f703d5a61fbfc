"""Makes every gRPC channel of the client. Knows nothing of what is said over one.

A channel never goes through the proxy that http_proxy and its like name: that is for the way out of a network, and
routers are inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import grpc

Options: TypeAlias = Sequence[tuple[str, int]]

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.max_send_message_length", 64 * 2**20),
    # A router that died is back on its port within seconds: do not wait longer than that to see it.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.http2.max_pings_without_data", 0),  # a long prefill brings no data, and is probed as often
)


def channel_options(router_silence_s: float) -> Options:
    """Of channels to routers, one of which is lost when it answers no probe for so long.

    A hanging router sends nothing while its host still acknowledges TCP: only our own probes find it.
    """
    probe_ms, answer_ms = max(1, int(router_silence_s * 1000 / 3)), max(1, int(router_silence_s * 1000 * 2 / 3))
    return (
        *_OPTIONS,
        ("grpc.keepalive_time_ms", probe_ms),
        ("grpc.keepalive_timeout_ms", answer_ms),
        ("grpc.http2.ping_timeout_ms", answer_ms),  # without it a minute, whatever keepalive says
    )


def dial(address: str, options: Options) -> grpc.Channel:
    """A channel to HOST:PORT; it connects when it is used."""
    return grpc.insecure_channel(address, options=options)


def dial_async(address: str, options: Options) -> grpc.aio.Channel:
    """As dial, for an event loop."""
    return grpc.aio.insecure_channel(address, options=options)
