"""Server-sent events over ASGI, and work that ends when the client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping
from typing import Any

from starlette.types import Receive, Send

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def start(send: Send) -> None:
    """Status 200: from here on errors are events."""
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})


async def send_data(send: Send, content: Mapping[str, Any], event_id: str = "", kind: str = "") -> None:
    """One event with JSON. kind: its type, where the client looks at it."""
    fields = (f"id: {event_id}\n" if event_id else "") + (f"event: {kind}\n" if kind else "")
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    await send_raw(send, f"{fields}data: {data}\n\n".encode())


async def send_raw(send: Send, data: bytes) -> None:
    """Bytes as they are."""
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def end(send: Send) -> None:
    """Nothing follows."""
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Do the work, unless the client goes away first: then it is cancelled."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
