"""POST /v1/responses: from the request to one JSON body, or a stream of typed events.

Knows HTTP; knows nothing of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from router.api import sse
from router.api.chat.answer_message import deltas_of
from router.api.http_body import read_json
from router.api.renaming import refusing, renaming
from router.api.responses.items import messages_of
from router.api.responses.output import ResponseOutput
from router.api.responses.request import ResponsesRequest, parse_responses
from router.api.tenancy import tenant_salt
from router.errors import InvalidRequest, Overloaded, RouterError
from router.events import Event, Finished, GenerationRequest, Started, Tokens
from router.service.generation import Generation

_RENAMED = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}


class ResponsesApi:
    """The endpoint of one router."""

    def __init__(self, generation: Generation, max_body_bytes: int) -> None:
        self._generation = generation
        self._max_body_bytes = max_body_bytes

    def routes(self) -> Sequence[Route]:
        """For the HTTP application."""
        return [Route("/v1/responses", self.create, methods=["POST"])]

    async def create(self, request: Request) -> Response:
        """A response, which is kept nowhere."""
        body = parse_responses(await read_json(request, self._max_body_bytes))
        await self._generation.preparation.check_model(body.model)
        order = self._order(body, tenant_salt(request.headers.get("authorization", "")))
        stream = self._generation.stream(order, commits_first=bool(body.stream))
        names = {**_RENAMED, "grammar": "text.format" if body.has_form else "tools"}
        return _Answer(refusing(stream, names), ResponseOutput(body.shown(), int(time.time())), bool(body.stream))

    def _order(self, body: ResponsesRequest, salt: bytes) -> GenerationRequest:
        sampling = body.sampling(self._generation.files.sampling_defaults.max_new_tokens)
        messages, calls = messages_of(body.input, body.instructions), body.tool_use().calls()
        with renaming({**_RENAMED, "grammar": "text.format"}):
            options = {**self._generation.chat.effort_options(body.effort), **body.template_options()}
            prompt = self._generation.chat.prompt(messages, options, calls, sampling.grammar)
        return GenerationRequest(
            prompt.text,
            dataclasses.replace(sampling, grammar=prompt.grammar),
            body.model,
            add_special_tokens=False,
            deadline_s=body.deadline_s,
            priority=body.priority or 0,
            tenant_salt=salt,
            cache_salt=(body.cache_salt or "").encode(errors="surrogatepass"),
            prompt_uses_clock=self._generation.chat.uses_clock,
            answer=prompt.answer,
        )


class _Answer(Response):
    """Runs the stream and answers. A RouterError before the first byte is the caller's."""

    def __init__(self, stream: AsyncGenerator[Event, None], output: ResponseOutput, is_stream: bool) -> None:
        super().__init__()
        self._stream = stream
        self._output = output
        self._is_stream = is_stream
        self._num_prompt_tokens = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._send_events(send) if self._is_stream else self._send_body(scope, receive, send)
        await sse.until_disconnect(work, receive)

    async def _send_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        last: dict[str, Any] = {}
        async with contextlib.aclosing(self._stream) as stream:
            async for event in stream:
                for shown in self._shown(event):
                    last = shown
        await JSONResponse(last["response"])(scope, receive, send)

    async def _send_events(self, send: Send) -> None:
        is_open = False
        async with contextlib.aclosing(self._stream) as stream:
            try:
                async for event in stream:
                    if not is_open:
                        await sse.start(send)
                        is_open = True
                    for shown in self._shown(event):
                        await sse.send_data(send, shown, kind=shown["type"])
            except RouterError as error:
                if not is_open:
                    raise
                for shown in self._output.failed(_error_code(error), error.message):
                    await sse.send_data(send, shown, kind=shown["type"])
        await sse.end(send)

    def _shown(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, Started):
            self._num_prompt_tokens = event.num_prompt_tokens
            yield from self._output.started(event)
        elif isinstance(event, Tokens):
            yield from self._output.said(deltas_of(event))
        elif isinstance(event, Finished):
            yield from self._output.finished(event, self._num_prompt_tokens)


def _error_code(error: RouterError) -> str:
    """In OpenAI's words."""
    if isinstance(error, InvalidRequest):
        return "invalid_prompt"
    return "rate_limit_exceeded" if isinstance(error, Overloaded) else "server_error"
