"""Between the client's types and the messages of GenerationService. Pure conversion; the router checks values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from switchyard_client._errors import GenerationError
from switchyard_client._stubs import generation_pb2
from switchyard_client._types import (
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Grammar,
    PromptTokens,
    RequestStats,
    SamplingParams,
    ServedAdapter,
    Started,
    TokenLogprobs,
    Tokens,
)

_REASONS = {
    generation_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    generation_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


_POOLINGS = {"last": generation_pb2.POOLING_LAST, "mean": generation_pb2.POOLING_MEAN}


def request_message(request: GenerationRequest) -> generation_pb2.GenerateRequest:
    """A Generate call's message. Raises GenerationError for what a field cannot carry."""
    options = {field.name: getattr(request.sampling, field.name) for field in fields(SamplingParams)}
    try:
        options["banned_sequences"] = [generation_pb2.TokenIds(ids=ids) for ids in request.sampling.banned_sequences]
        options["grammar"] = None if request.sampling.grammar is None else _grammar(request.sampling.grammar)
        message = generation_pb2.GenerateRequest(
            model=request.model,
            sampling=generation_pb2.SamplingParams(**options),
            cache_salt=request.cache_salt,
            priority=request.priority,
        )
        if isinstance(request.prompt, str):
            message.text = request.prompt
        else:
            message.token_ids.CopyFrom(generation_pb2.TokenIds(ids=request.prompt))
    except ValueError as error:
        raise GenerationError("INVALID_ARGUMENT", str(error), None) from None
    return message


def many_message(
    requests: Sequence[GenerationRequest], n: int, best_of: int | None
) -> generation_pb2.GenerateManyRequest:
    """A GenerateMany call's message. Raises GenerationError for what a field cannot carry."""
    messages = [request_message(request) for request in requests]
    try:
        return generation_pb2.GenerateManyRequest(requests=messages, n=n, best_of=best_of)
    except ValueError as error:
        raise GenerationError("INVALID_ARGUMENT", str(error), None) from None


def embed_message(prompt: str | Sequence[int], pooling: str, is_raw: bool, model: str) -> generation_pb2.EmbedRequest:
    """An Embed call's message. Raises GenerationError for what a field cannot carry."""
    if pooling not in _POOLINGS:
        raise GenerationError("INVALID_ARGUMENT", f"pooling: must be last or mean, not {pooling!r}", None)
    try:
        message = generation_pb2.EmbedRequest(model=model, pooling=_POOLINGS[pooling], is_raw=is_raw)
        if isinstance(prompt, str):
            message.text = prompt
        else:
            message.token_ids.CopyFrom(generation_pb2.TokenIds(ids=prompt))
    except ValueError as error:
        raise GenerationError("INVALID_ARGUMENT", str(error), None) from None
    return message


def served_adapter(message: generation_pb2.AdapterInfo) -> ServedAdapter:
    """What is said of an adapter."""
    return ServedAdapter(message.name, message.digest, message.path, message.parent, message.is_pinned)


def _grammar(grammar: Grammar) -> generation_pb2.Grammar:
    given = {field.name: getattr(grammar, field.name) for field in fields(Grammar)}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"grammar: needs one of its fields, not {len(given)}")
    if grammar.choice is not None:
        return generation_pb2.Grammar(choice=generation_pb2.Texts(texts=grammar.choice))
    return generation_pb2.Grammar(**given)


def event_of(message: generation_pb2.GenerateResponse) -> Event | None:
    """What a message of a stream says; None for a kind of event that this client does not know."""
    kind = message.WhichOneof("event")
    if kind == "tokens":
        tokens = message.tokens
        return Tokens(tokens.first_position, tuple(tokens.ids), tokens.text, tuple(map(_logprobs, tokens.logprobs)))
    if kind == "prompt_tokens":
        prompt = message.prompt_tokens
        logprobs: list[TokenLogprobs | None] = [*map(_logprobs, prompt.logprobs)]
        if prompt.first_position == 0:
            logprobs[:1] = [None]
        return PromptTokens(prompt.first_position, tuple(prompt.ids), tuple(logprobs))
    if kind == "started":
        started = message.started
        return Started(message.stream_id, started.model, started.num_prompt_tokens, started.seed)
    return _finished(message.finished) if kind == "finished" else None


def _logprobs(message: generation_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(message.logprob, tuple(message.top_ids), tuple(message.top_logprobs))


def _finished(message: generation_pb2.Finished) -> Finished:
    reason = _REASONS.get(message.reason)
    if reason is None:
        raise GenerationError("UNIMPLEMENTED", f"finish reason {message.reason} is newer than this client", None)
    stats = RequestStats(**{field.name: getattr(message.stats, field.name) for field in fields(RequestStats)})
    return Finished(reason, message.num_output_tokens, stats)
