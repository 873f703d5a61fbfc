"""The gRPC API: GenerationService, health and reflection. Maps errors to statuses, once, here.

Knows protobuf and grpc.aio; knows nothing of how a request is served.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from switchyard.v1 import generation_pb2, generation_pb2_grpc, status_pb2_grpc

from kvstore.network.addresses import join_host_port
from router import errors
from router.api.choices import MAX_STREAMS, best_choices, check_counts, interleave, spread, streams_over_one_prompt
from router.api.request_ids import REQUEST_ID, request_id
from router.api.status_api import SERVICE as STATUS_SERVICE
from router.api.status_api import StatusServicer
from router.api.tenancy import tenant_salt
from router.errors import PortInUse, RouterError, is_counted
from router.events import Event, Started, Tokens
from router.fleet.messages import (
    adapter_info,
    embed_request,
    embed_response,
    event_message,
    generation_request,
    resume_request,
)
from router.metrics import Metrics
from router.sampling import invalid
from router.service.generation import Generation

log = logging.getLogger(__name__)

SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name

# The most specific entry wins.
STATUS_OF: dict[type[RouterError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnknownModel: grpc.StatusCode.NOT_FOUND,
    errors.UnknownStream: grpc.StatusCode.NOT_FOUND,
    errors.AdaptersOff: grpc.StatusCode.UNIMPLEMENTED,
    errors.PathForbidden: grpc.StatusCode.PERMISSION_DENIED,
    errors.AdapterExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.AdapterConfigured: grpc.StatusCode.FAILED_PRECONDITION,
    errors.PromptTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Superseded: grpc.StatusCode.ABORTED,
    errors.RouterError: grpc.StatusCode.INTERNAL,
}

_Behaviour = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]


class GrpcApi:
    """The listening gRPC server of one router."""

    def __init__(
        self, generation: Generation, metrics: Metrics, status: StatusServicer, max_message_bytes: int
    ) -> None:
        options = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.so_reuseport", 0),  # two routers on one port must not share it silently
            # A client whose host vanished closes nothing: without these its streams would run to their end.
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.http2.ping_timeout_ms", 5_000),  # without it a minute, whatever keepalive says
            # Clients probe in their turn, for a router may hang. gRPC would take more than one probe in five minutes
            # without data for an attack and end the connection in the middle of a long prefill.
            ("grpc.http2.min_ping_interval_without_data_ms", 500),
        ]
        self._server = grpc.aio.server(interceptors=[_Edge(metrics)], options=options)
        self._health = health.aio.HealthServicer()
        servicer = _Servicer(generation)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, self._server)
        status_pb2_grpc.add_StatusServiceServicer_to_server(status, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, STATUS_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> str:
        """Listen; the address. Raises PortInUse."""
        try:
            bound = self._server.add_insecure_port(join_host_port(host, port))
        except RuntimeError:
            bound = 0
        if bound == 0:
            raise PortInUse(f"gRPC port {port} on {host} is in use or cannot be bound")
        await self.set_serving(False)
        await self._server.start()
        return join_host_port(host, bound)

    async def set_serving(self, is_serving: bool) -> None:
        """The status that health checks get."""
        kinds = health_pb2.HealthCheckResponse
        for name in ("", SERVICE):
            await self._health.set(name, kinds.SERVING if is_serving else kinds.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running ones end for so long, then cancel them."""
        await self._server.stop(grace_s)


class _Servicer(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:  # written, not yielded: a cancelled call then closes the stream at once
        order = generation_request(request, context.time_remaining(), _tenant_salt(context))
        await _write(self._generation.stream(order), context)

    async def GenerateMany(
        self, request: generation_pb2.GenerateManyRequest, context: grpc.aio.ServicerContext
    ) -> None:
        n = request.n if request.HasField("n") else 1
        best_of = request.best_of if request.HasField("best_of") else n
        if not request.requests:
            raise invalid("requests", "must not be empty")
        if len(request.requests) > MAX_STREAMS:
            raise invalid("requests", f"at most {MAX_STREAMS}, not {len(request.requests)}")
        check_counts(len(request.requests), n, best_of, is_stream=False)
        deadline_s, salt = context.time_remaining(), _tenant_salt(context)
        orders = [generation_request(one, deadline_s, salt) for one in request.requests]
        groups = [spread(order, n, best_of) for order in orders]
        for order in orders:
            await self._generation.preparation.check_model(order.model)
        self._generation.check([group[0] for group in groups])
        streams = [stream for group in groups for stream in streams_over_one_prompt(group, self._generation.stream)]
        stream_ids: dict[int, str] = {}
        shown = best_choices(streams, n, best_of) if best_of > n else interleave(streams)
        async with contextlib.aclosing(shown) as events:
            async for index, event in events:
                if isinstance(event, Started):
                    stream_ids[index] = event.stream_id
                if isinstance(event, Tokens) and orders[index // n].sampling.logprobs is None:
                    event = dataclasses.replace(event, logprobs=())  # the best are found by them
                response = event_message(stream_ids[index], event)
                await context.write(generation_pb2.GenerateManyResponse(index=index, response=response))

    async def Resume(self, request: generation_pb2.ResumeRequest, context: grpc.aio.ServicerContext) -> None:
        await _write(self._generation.resume(resume_request(request, _tenant_salt(context))), context)

    async def Embed(
        self, request: generation_pb2.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.EmbedResponse:
        order, pooling = embed_request(request, context.time_remaining(), _tenant_salt(context))
        return embed_response(await self._generation.embed(order, pooling), request.is_raw)

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.TokenizeResponse:
        ids = await self._generation.tokenize(request.model, request.text)
        return generation_pb2.TokenizeResponse(ids=ids)

    async def ListModels(
        self, request: generation_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.ListModelsResponse:
        files = self._generation.files
        context_tokens = self._generation.preparation.context_tokens
        model = generation_pb2.ModelInfo(name=files.name, context_tokens=context_tokens, vocab_size=files.vocab_size)
        adapters = [
            generation_pb2.ModelInfo(
                name=record.name,
                context_tokens=context_tokens,
                vocab_size=files.vocab_size,
                parent=record.parent,
                root=record.path,
            )
            for record in self._generation.adapters.served
        ]
        return generation_pb2.ListModelsResponse(models=[model, *adapters])

    async def LoadAdapter(
        self, request: generation_pb2.LoadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.LoadAdapterResponse:
        record = await self._generation.adapters.load(request.name, request.path, request.load_inplace, request.pin)
        return generation_pb2.LoadAdapterResponse(adapter=adapter_info(record))

    async def UnloadAdapter(
        self, request: generation_pb2.UnloadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.UnloadAdapterResponse:
        await self._generation.adapters.unload(request.name)
        return generation_pb2.UnloadAdapterResponse()

    async def ListAdapters(
        self, request: generation_pb2.ListAdaptersRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.ListAdaptersResponse:
        return generation_pb2.ListAdaptersResponse(adapters=map(adapter_info, self._generation.adapters.served))


def _tenant_salt(context: grpc.aio.ServicerContext) -> bytes:
    return tenant_salt(_metadata(context, "authorization"))


def _metadata(context: grpc.aio.ServicerContext, name: str) -> str:
    values = [value for key, value in context.invocation_metadata() or () if key == name]
    return str(values[0]) if values else ""


async def _write(events: AsyncGenerator[Event, None], context: grpc.aio.ServicerContext) -> None:
    stream_id = ""
    async with contextlib.aclosing(events):
        async for event in events:
            stream_id = stream_id or getattr(event, "stream_id", "")
            await context.write(event_message(stream_id, event))


class _Edge(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Parses requests and maps errors for our own service, so that both end in a status that says what is wrong.

    Left to grpc, a message that does not parse (a text that is not UTF-8) becomes UNKNOWN. Each call gets its request
    id back, and what never reached generation is counted here.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None:
            self._metrics.refused(errors.UnknownRoute.code)
        if handler is None or not handler_call_details.method.startswith(f"/{SERVICE}/"):
            return handler
        parse, serialize = handler.request_deserializer, handler.response_serializer
        if handler.unary_stream is not None:
            guarded = self._guard(handler.unary_stream, parse)
            return grpc.unary_stream_rpc_method_handler(guarded, None, serialize)
        return grpc.unary_unary_rpc_method_handler(self._guard(handler.unary_unary, parse), None, serialize)

    def _guard(self, behaviour: _Behaviour, parse: Callable[[bytes], Message]) -> _Behaviour:
        async def guarded(raw: bytes, context: grpc.aio.ServicerContext) -> Any:
            try:
                await context.send_initial_metadata(((REQUEST_ID, request_id(_metadata(context, REQUEST_ID))),))
                return await behaviour(parse(raw), context)
            except DecodeError:
                self._metrics.refused(errors.InvalidRequest.code)
                message = "request: does not parse as this method's message (are all texts UTF-8?)"
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
            except RouterError as error:
                self._count(error, error.code)
                await context.abort(_status(error), error.message, _trailers(error))
            except Exception as error:
                if context.done():  # the client is gone, and writing to it failed
                    raise
                self._count(error, RouterError.code)
                log.exception("a call failed with an unexpected error")
                await context.abort(grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}")

        return guarded

    def _count(self, error: Exception, outcome: str) -> None:
        if not is_counted(error):
            self._metrics.refused(outcome)


def _status(error: RouterError) -> grpc.StatusCode:
    return next(STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF)


def _trailers(error: RouterError) -> tuple[tuple[str, str], ...]:
    trailers = [("switchyard-error", error.code)]
    if error.param is not None:
        trailers.append(("switchyard-param", error.param))
    if error.retry_after_s is not None:
        trailers.append(("retry-after-s", f"{error.retry_after_s:.3f}"))
    return tuple(trailers)
