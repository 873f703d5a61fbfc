"""The HTTP API: OpenAI's completions, chat and responses, models, metrics, health. Maps errors to statuses, once, here.

Knows HTTP; knows nothing of how a request is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvstore.network.addresses import join_host_port, listen
from router import errors
from router.api.chat.answer_message import MessageShape
from router.api.chat.messages import checked_messages
from router.api.chat.tools import chat_tools
from router.api.choices import check_counts, spread, streams_over_one_prompt
from router.api.http_body import read_json
from router.api.models_api import ModelsApi
from router.api.openai.answer import LAST_EVENT_ID, AnswerStyle, OpenAiAnswer, error_body, parse_event_id
from router.api.openai.embeddings import EmbeddingsApi
from router.api.openai.schema import DEFAULT_COMPLETION_TOKENS, ChatRequest, CompletionRequest, Prompt, parse
from router.api.renaming import refusing, renaming
from router.api.request_ids import RequestIds
from router.api.responses.endpoint import ResponsesApi
from router.api.tenancy import tenant_salt
from router.api.tokenize_api import TokenizeApi
from router.errors import InvalidRequest, PortInUse, RouterError, UnknownRoute, is_counted, stopping
from router.events import Event, GenerationRequest, ResumeRequest
from router.metrics import Metrics
from router.sampling import SamplingParams
from router.service.generation import Generation
from router.service.readiness import Readiness

_HEADER_S = 30.0  # for the header of a request
_FLUSH_S = 0.5  # for the answers to requests that the end of the drain cut off

# The most specific entry wins.
STATUS_OF: dict[type[RouterError], int] = {
    errors.InvalidRequest: 400,
    errors.UnknownModel: 404,
    errors.UnknownStream: 404,
    errors.AdaptersOff: 404,
    errors.PathForbidden: 403,
    errors.AdapterExists: 409,
    errors.AdapterConfigured: 409,
    errors.PromptTooLarge: 413,
    errors.UnsupportedEncoding: 415,
    errors.Overloaded: 429,
    errors.Unavailable: 503,
    errors.DeadlineExceeded: 504,
    errors.Cancelled: 499,
    errors.Superseded: 409,
    errors.RouterError: 500,
}


@dataclass(frozen=True, slots=True)
class HttpParts:
    """What the HTTP API needs of the process."""

    generation: Generation
    metrics: Metrics
    readiness: Callable[[], Readiness]
    max_body_bytes: int
    cors_origins: Sequence[str] = ()  # none: web pages may not call it


class HttpApi:
    """The listening HTTP server of one router."""

    def __init__(self, parts: HttpParts) -> None:
        self._app = make_app(parts)
        self._server: _Server | None = None
        self._socket: socket.socket | None = None

    def bind(self, host: str, port: int) -> str:
        """Take the port; the address. Raises PortInUse."""
        try:
            self._socket = listen(host, port, backlog=1024)
        except OSError as error:
            raise PortInUse(f"HTTP port {port} on {host} is in use or cannot be bound ({error.strerror})") from None
        return join_host_port(host, self._socket.getsockname()[1])

    async def serve(self, drain_s: float) -> None:
        """Answer until stop(); then running answers have drain_s to end."""
        assert self._socket is not None, "bind() comes first"
        config = uvicorn.Config(
            self._app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=max(1, math.ceil(drain_s)),
        )
        self._server = _Server(config)
        await self._server.serve(sockets=[self._socket])
        if cut := list(self._server.server_state.tasks):
            await asyncio.wait(cut, timeout=_FLUSH_S)

    def close(self) -> None:
        """Let go of a port that is bound and was never served."""
        if self._socket is not None:
            self._socket.close()

    def stop(self) -> None:
        """Refuse new connections and let serve() end."""
        if self._server is not None:
            self._server.should_exit = True


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._waiting: dict[Any, tuple[object, float]] = {}  # by connection: its last request, and since when it waits

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the process handles signals, not the API

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if counter % 10 == 0:
            self._close_silent(time.monotonic())
        return await super().on_tick(counter)

    def _close_silent(self, now_s: float) -> None:
        """Close connections without a whole header of a request for too long: uvicorn bounds only what follows an
        answer, and not when the next header has begun. A body that comes slowly, or not at all, is not bounded."""
        waiting = {}
        for connection in self.server_state.connections:
            last = getattr(connection, "cycle", None)
            if last is None or last.response_complete:
                before, since_s = self._waiting.get(connection, (None, now_s))
                waiting[connection] = (last, since_s if before is last else now_s)
        self._waiting = waiting
        for connection, (_, since_s) in waiting.items():
            if now_s - since_s > _HEADER_S:
                connection.transport.close()


def make_app(parts: HttpParts) -> ASGIApp:
    """The ASGI application."""
    endpoints, on = _Endpoints(parts), _Errors(parts.metrics)
    app: ASGIApp = Starlette(
        routes=[
            Route("/v1/completions", endpoints.completions, methods=["POST"]),
            Route("/v1/chat/completions", endpoints.chat_completions, methods=["POST"]),
            *EmbeddingsApi(parts.generation, parts.max_body_bytes).routes(),
            *ResponsesApi(parts.generation, parts.max_body_bytes).routes(),
            *TokenizeApi(parts.generation, parts.max_body_bytes).routes(),
            *ModelsApi(parts.generation, parts.max_body_bytes).routes(),
            Route("/metrics", endpoints.metrics),
            Route("/health", endpoints.healthz),
            Route("/healthz", endpoints.healthz),
            Route("/readyz", endpoints.readyz),
        ],
        exception_handlers={
            RouterError: on.on_router_error,
            HTTPException: on.on_http_error,
            Exception: on.on_failure,
        },
    )
    if parts.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=parts.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id",),
        )
    return RequestIds(_AnsweredWhenCut(app))


class _AnsweredWhenCut:
    """Answers requests that end with the server: such as have not been read, or wait for a journal that is away.

    uvicorn cancels them when its time to stop is over, and would answer with a 500 without a body. What has begun to
    stream was told by its stream, or does not read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_begun = False

        async def noting(message: Message) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except asyncio.CancelledError:
            if is_begun:
                raise
            await _refusal(stopping())(scope, receive, send)


class _Endpoints:
    def __init__(self, parts: HttpParts) -> None:
        self._parts = parts
        self._generation = parts.generation

    async def completions(self, request: Request) -> Response:
        body = parse(CompletionRequest, await read_json(request, self._parts.max_body_bytes))
        await self._check_model(body.model, request)
        prompts = body.prompts()
        style = self._style(body, is_chat=False)
        check_counts(len(prompts), style.num_choices, style.num_candidates, style.is_stream)
        sampling = body.sampling(DEFAULT_COMPLETION_TOKENS)
        orders = [self._order(prompt, sampling, body, request) for prompt in prompts]
        if (known := _resumption(request, style)) is not None:
            return OpenAiAnswer([self._resume(known, orders[0])], style)
        if body.echo:
            self._generation.check(orders)
            style = dataclasses.replace(style, echoes=[self._generation.text_of(prompt) for prompt in prompts])
        return OpenAiAnswer(self._streams(orders, style, body.renamed_fields()), style)

    async def _check_model(self, name: str, request: Request) -> None:
        """Of a request that is new: a stream goes on though its adapter was unloaded meanwhile."""
        if not request.headers.get(LAST_EVENT_ID):
            await self._generation.preparation.check_model(name)

    def _order(
        self, prompt: Prompt, sampling: SamplingParams, body: ChatRequest | CompletionRequest, call: Request
    ) -> GenerationRequest:
        return GenerationRequest(
            prompt,
            sampling,
            body.model,
            deadline_s=body.deadline_s,
            tenant_salt=_tenant_salt(call),
            cache_salt=(body.cache_salt or "").encode(errors="surrogatepass"),
            priority=body.priority or 0,
        )

    def _streams(
        self, orders: Sequence[GenerationRequest], style: AnswerStyle, renamed: Mapping[str, str]
    ) -> list[AsyncGenerator[Event, None]]:
        """Those of all choices of all prompts; nothing begins before all of them are checked."""
        groups = [spread(order, style.num_choices, style.num_candidates) for order in orders]
        is_single = len(orders) == style.num_candidates == 1
        if not is_single:
            with renaming(renamed):
                self._generation.check([group[0] for group in groups])

        def begin(one: GenerationRequest) -> AsyncGenerator[Event, None]:
            return self._generation.stream(one, commits_first=style.is_stream and is_single)

        streams = [stream for group in groups for stream in streams_over_one_prompt(group, begin)]
        return [refusing(stream, renamed) for stream in streams] if renamed else streams

    async def chat_completions(self, request: Request) -> Response:
        body = parse(ChatRequest, await read_json(request, self._parts.max_body_bytes))
        await self._check_model(body.model, request)
        tools = chat_tools(body)
        shape = MessageShape(body.include_reasoning is not False, tools.is_deprecated)
        style = dataclasses.replace(self._style(body, is_chat=True), message=shape)
        messages, calls = checked_messages(body.messages), tools.calls()
        sampling = body.sampling(self._generation.files.sampling_defaults.max_new_tokens)
        options = {**self._generation.chat.effort_options(body.reasoning_effort), **body.template_options()}
        with renaming(body.renamed_fields()):
            prompt = self._generation.chat.prompt(messages, options, calls, sampling.grammar)
        check_counts(1, style.num_choices, style.num_candidates, style.is_stream)
        order = dataclasses.replace(
            self._order(prompt.text, dataclasses.replace(sampling, grammar=prompt.grammar), body, request),
            add_special_tokens=False,
            prompt_uses_clock=self._generation.chat.uses_clock,
            answer=prompt.answer,
        )
        if (known := _resumption(request, style)) is not None:
            return OpenAiAnswer([self._resume(known, order)], style)
        renamed = {"grammar": calls.param, **body.renamed_fields()}
        return OpenAiAnswer(self._streams([order], style, renamed), style)

    def _resume(self, known: ResumeRequest, repeated: GenerationRequest) -> AsyncGenerator[Event, None]:
        """As Generation.resume, whose fields are one header here."""
        fields = ("stream_id", "num_tokens", "token_ids")
        known = dataclasses.replace(known, repeated=repeated)
        return refusing(self._generation.resume(known, commits_first=True), dict.fromkeys(fields, LAST_EVENT_ID))

    def _style(self, body: CompletionRequest | ChatRequest, is_chat: bool) -> AnswerStyle:
        has_echo = isinstance(body, CompletionRequest) and bool(body.echo)
        return AnswerStyle(
            is_chat=is_chat,
            is_stream=bool(body.stream),
            has_usage_chunk=body.has_usage_chunk,
            has_token_ids=bool(body.return_token_ids),
            # Logprobs of an echoed prompt are not kept.
            has_event_ids=self._generation.can_resume and not (has_echo and body.num_logprobs is not None),
            model=body.model,
            num_choices=body.num_choices,
            num_candidates=body.num_candidates,
            bytes_of=self._generation.codec.bytes_alone,
            has_logprobs=body.num_logprobs is not None,
            has_prompt_logprobs=body.prompt_logprobs is not None,
        )

    async def metrics(self, request: Request) -> Response:
        return Response(self._parts.metrics.text(), media_type="text/plain; version=0.0.4")

    async def healthz(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(self, request: Request) -> Response:
        state = self._parts.readiness()
        return JSONResponse(dataclasses.asdict(state), status_code=200 if state.is_ready else 503)


def _resumption(request: Request, style: AnswerStyle) -> ResumeRequest | None:
    """What a client that lost its connection has; it sends its request again, with the id of the last event it saw.

    None for a request that is new. Raises InvalidRequest.
    """
    event_id = request.headers.get(LAST_EVENT_ID)
    if not event_id:
        return None
    if not style.is_stream or (style.has_logprobs and not style.has_event_ids):
        message = f"{LAST_EVENT_ID}: only what is streamed, and has no echo with logprobs, can be resumed"
        raise InvalidRequest(message, param=LAST_EVENT_ID)
    return dataclasses.replace(parse_event_id(event_id), tenant_salt=_tenant_salt(request))


def _tenant_salt(request: Request) -> bytes:
    return tenant_salt(request.headers.get("authorization", ""))


def _refusal(error: RouterError) -> Response:
    status = next(STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF)
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return JSONResponse(error_body(error), status_code=status, headers=headers)


class _Errors:
    """What becomes of errors: a status, a body, and one entry in the metrics for what never reached generation."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def on_router_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, RouterError), "registered for RouterError"
        self._count(error, error.code)
        return _refusal(error)

    async def on_http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for HTTPException"
        kind = UnknownRoute if error.status_code in (404, 405) else InvalidRequest
        named = kind(f"{request.method} {request.url.path}: {error.detail}")
        self._count(error, named.code)
        return JSONResponse(error_body(named), status_code=error.status_code, headers=error.headers)

    async def on_failure(self, request: Request, error: Exception) -> Response:
        self._count(error, RouterError.code)
        body = error_body(RouterError(f"internal error: {type(error).__name__}"))
        return JSONResponse(body, status_code=500)

    def _count(self, error: Exception, outcome: str) -> None:
        if not is_counted(error):
            self._metrics.refused(outcome)
