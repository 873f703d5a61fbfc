"""X-Request-Id: each call has one, its client's or a fresh one, and gets it back. Knows ASGI; knows no endpoint."""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = "x-request-id"
_MAX_CHARACTERS = 128


def request_id(given: str | None) -> str:
    """The client's id, if it is short and printable ASCII; otherwise a fresh one."""
    is_fit = given and len(given) <= _MAX_CHARACTERS and given.isascii() and given.isprintable() and given.strip()
    return given if given and is_fit else secrets.token_hex(16)


class RequestIds:
    """Puts the id on every answer of an application, errors and streams included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        header = (REQUEST_ID.encode(), request_id(Headers(scope=scope).get(REQUEST_ID)).encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await self._app(scope, receive, send_with_id)
