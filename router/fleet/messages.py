"""Converts between the router's own types and the protobuf messages of clients and workers. Pure; checks nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from switchyard.v1 import adapter_pb2 as adapter
from switchyard.v1 import generation_pb2 as generation
from switchyard.v1 import journal_pb2 as journal
from switchyard.v1 import worker_pb2 as worker

from checkpoint.identity import ServedModel
from kvstore.control.adapter_registry import AdapterRecord
from kvstore.control.roles import ROLE_NAMES
from router.events import (
    AdapterRef,
    Embedding,
    Event,
    FinishReason,
    GenerationRequest,
    Pooling,
    PromptTokens,
    RequestStats,
    ResumeRequest,
    Started,
    TokenLogprobs,
    Tokens,
)
from router.fleet.fleet import KvLayout, LoadReport, WorkerInfo
from router.placement.affinity import BlockChanges, BlockEvent, SnapshotPart
from router.placement.policy import Role
from router.placement.residency import HeldAdapters
from router.placement.streams import Outcome, Part, PartReport, PartTimes
from router.sampling import NO_COMPLETION, SamplingParams, invalid, sampling_message, sampling_params

_ROLES = {number: Role(name) for number, name in ROLE_NAMES.items()}
_PARTS = {
    Part.WHOLE: worker.REQUEST_ROLE_MIXED,
    Part.PREFILL: worker.REQUEST_ROLE_PREFILL,
    Part.DECODE: worker.REQUEST_ROLE_DECODE,
    Part.EMBED: worker.REQUEST_ROLE_EMBED,
}
_POOLINGS = {Pooling.LAST: generation.POOLING_LAST, Pooling.MEAN: generation.POOLING_MEAN}
_OUTCOMES = {
    worker.REQUEST_OUTCOME_STOP: Outcome.STOP,
    worker.REQUEST_OUTCOME_LENGTH: Outcome.LENGTH,
    worker.REQUEST_OUTCOME_CANCELLED: Outcome.CANCELLED,
    worker.REQUEST_OUTCOME_PREFILLED: Outcome.PREFILLED,
    worker.REQUEST_OUTCOME_FAILED: Outcome.FAILED,
    worker.REQUEST_OUTCOME_STEP_FAILED: Outcome.STEP_FAILED,
    worker.REQUEST_OUTCOME_ADAPTER_FAILED: Outcome.ADAPTER_FAILED,
}
_REASONS = {
    FinishReason.STOP: generation.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True, slots=True)
class PartOrder:
    """All that the router sends a worker about a part."""

    stream_id: str
    epoch: int
    part: Part
    token_ids: Sequence[int]  # prompt, then what was emitted
    num_prompt_tokens: int  # of token_ids, the client's
    sampling: SamplingParams  # settled: nothing is left open
    window_tokens: int
    deadline_s: float  # seconds from now; 0 means none
    tenant_salt: bytes
    tenant: bytes
    priority: int
    pooling: Pooling | None = None  # for EMBED
    adapter: AdapterRef | None = None


def submit_message(order: PartOrder) -> worker.ConnectRequest:
    """A Submit."""
    submit = worker.Submit(
        stream_id=order.stream_id,
        epoch=order.epoch,
        role=_PARTS[order.part],
        token_ids=order.token_ids,
        num_prompt_tokens=order.num_prompt_tokens,
        sampling=sampling_message(order.sampling),
        window_tokens=order.window_tokens,
        deadline_s=order.deadline_s,
        tenant_salt=order.tenant_salt,
        tenant=order.tenant,
        priority=order.priority,
        pooling=generation.POOLING_UNSPECIFIED if order.pooling is None else _POOLINGS[order.pooling],
        adapter=None if order.adapter is None else adapter_message(order.adapter),
    )
    return worker.ConnectRequest(submit=submit)


def adapter_message(ref: AdapterRef) -> adapter.Adapter:
    """As workers and the journal have it."""
    return adapter.Adapter(name=ref.name, digest=ref.digest, path=ref.path)


def pin_message(refs: Sequence[AdapterRef]) -> worker.ConnectRequest:
    """A PinAdapters."""
    pins = adapter.PinAdapters(adapters=map(adapter_message, refs))
    return worker.ConnectRequest(pin_adapters=pins)


def adapter_info(record: AdapterRecord) -> generation.AdapterInfo:
    """As clients see it."""
    return generation.AdapterInfo(
        name=record.name,
        digest=record.digest,
        path=record.path,
        parent=record.parent,
        is_pinned=record.is_pinned,
    )


def generation_request(
    message: generation.GenerateRequest, deadline_s: float | None, tenant_salt: bytes
) -> GenerationRequest:
    """The request of a gRPC client; a prompt that is not set is an empty one. Raises InvalidRequest."""
    if message.sampling.HasField("grammar") and message.sampling.grammar.WhichOneof("kind") is None:
        raise invalid("grammar", "must have one of its kinds")
    return GenerationRequest(
        prompt=_prompt(message),
        sampling=sampling_params(message.sampling),
        model=message.model,
        deadline_s=deadline_s,
        tenant_salt=tenant_salt,
        cache_salt=message.cache_salt,
        priority=message.priority,
    )


def embed_request(
    message: generation.EmbedRequest, deadline_s: float | None, tenant_salt: bytes
) -> tuple[GenerationRequest, Pooling]:
    """What a gRPC client wants embedded. Raises InvalidRequest."""
    if message.pooling not in generation.Pooling.values():
        raise invalid("pooling", f"{message.pooling} is not known")
    request = GenerationRequest(
        prompt=_prompt(message),
        sampling=NO_COMPLETION,
        model=message.model,
        deadline_s=deadline_s,
        tenant_salt=tenant_salt,
        cache_salt=message.cache_salt,
        priority=message.priority,
    )
    return request, Pooling.MEAN if message.pooling == generation.POOLING_MEAN else Pooling.LAST


def _prompt(message: generation.GenerateRequest | generation.EmbedRequest) -> str | tuple[int, ...]:
    return tuple(message.token_ids.ids) if message.WhichOneof("prompt") == "token_ids" else message.text


def embed_response(embedding: Embedding, is_raw: bool) -> generation.EmbedResponse:
    """The answer to an EmbedRequest."""
    return generation.EmbedResponse(
        values=embedding.values if is_raw else embedding.normalized(),
        num_prompt_tokens=embedding.num_prompt_tokens,
        num_cached_prompt_tokens=embedding.num_cached_prompt_tokens,
        worker_id=embedding.worker_id,
    )


def resume_request(message: generation.ResumeRequest, tenant_salt: bytes) -> ResumeRequest:
    """The stream that a gRPC client resumes."""
    ids = tuple(message.token_ids.ids)
    return ResumeRequest(message.stream_id, message.num_tokens, ids, message.has_rest, tenant_salt)


def journal_header(request: GenerationRequest, served: ServedModel, deadline_unix_s: float | None) -> bytes:
    """A StreamRecord of a request that leaves nothing open and whose prompt is token ids."""
    assert not isinstance(request.prompt, str), "the prompt is encoded before it is written down"
    message = generation.GenerateRequest(
        model=request.model,
        token_ids=generation.TokenIds(ids=request.prompt),
        sampling=sampling_message(request.sampling),
        cache_salt=request.cache_salt,
        priority=request.priority,
    )
    record = journal.StreamRecord(
        request=message,
        deadline_unix_s=deadline_unix_s or 0.0,
        tenant_salt=request.tenant_salt,
        served=served.message(),
        adapter=None if request.adapter is None else adapter_message(request.adapter),
    )
    header: bytes = record.SerializeToString()
    return header


def journal_record(header: bytes) -> tuple[GenerationRequest, ServedModel, float | None]:
    """The request of a header, what was served where it began, and its deadline in seconds since 1970."""
    record = journal.StreamRecord.FromString(header)
    request = generation_request(record.request, None, record.tenant_salt)
    if record.HasField("adapter"):
        kept = record.adapter
        request = dataclasses.replace(request, adapter=AdapterRef(kept.name, kept.digest, kept.path))
    return request, ServedModel.of(record.served), record.deadline_unix_s or None


def worker_info(hello: worker.WorkerHello, pool: str) -> WorkerInfo | None:
    """Who a worker says it is; None when it names no role that this router knows."""
    role = _ROLES.get(hello.role)
    if role is None or hello.block_size < 1 or not hello.worker_id:
        return None
    return WorkerInfo(
        worker_id=hello.worker_id,
        pool=pool,
        role=role,
        kv=KvLayout(hello.kv_fingerprint, hello.block_size),
        num_blocks=hello.num_blocks,
        context_tokens=hello.model.context_tokens,
    )


def load_report(load: worker.WorkerLoad) -> LoadReport:
    """The part of a load that placement looks at."""
    return LoadReport(
        num_streams=load.num_running + load.num_waiting + load.num_waiting_for_kv,
        num_free_blocks=load.num_free_blocks,
        num_queued_tokens=load.num_queued_tokens,
        adapters=HeldAdapters(load.num_adapter_slots, frozenset(load.device_adapters), frozenset(load.host_adapters)),
    )


def block_event(message: worker.WatchBlocksResponse) -> BlockEvent | None:
    """A worker's block event; None for a kind of message that this router does not know."""
    kind = message.WhichOneof("message")
    if kind == "snapshot":
        part = message.snapshot
        return SnapshotPart(part.sequence, part.part, part.is_last, part.names)
    if kind == "changes":
        changes = message.changes
        return BlockChanges(changes.after, changes.sequence, changes.stored, changes.removed)
    return None


def token_logprobs(message: generation.TokenLogprobs) -> TokenLogprobs:
    """Of one token."""
    return TokenLogprobs(message.logprob, tuple(message.top_ids), tuple(message.top_logprobs))


def part_report(message: worker.RequestFinished) -> PartReport:
    """A worker's final report of a part; an outcome that this router does not know is a failure."""
    return PartReport(
        outcome=_OUTCOMES.get(message.outcome, Outcome.FAILED),
        error=message.error,
        is_invalid_request=message.is_invalid_request,
        num_cached_prompt_tokens=message.num_cached_prompt_tokens,
        num_computed_prompt_tokens=message.num_computed_prompt_tokens,
        num_transferred_blocks=message.num_transferred_blocks,
        num_drafts=message.num_drafts,
        num_draft_tokens=message.num_draft_tokens,
        num_accepted_tokens=message.num_accepted_tokens,
        embedding=tuple(message.embedding),
        times=PartTimes(
            continued_s=message.times.continued_s,
            first_step_s=message.times.first_step_s,
            first_token_s=message.times.first_token_s,
        ),
    )


def event_message(stream_id: str, event: Event) -> generation.GenerateResponse:
    """One message of a Generate stream."""
    if isinstance(event, PromptTokens):
        prompt_tokens = generation.PromptTokens(first_position=event.first_position, ids=event.ids)
        prompt_tokens.logprobs.extend(map(_logprobs_message, event.logprobs))
        return generation.GenerateResponse(stream_id=stream_id, prompt_tokens=prompt_tokens)
    if isinstance(event, Tokens):
        tokens = generation.Tokens(first_position=event.first_position, ids=event.ids, text=event.text)
        tokens.logprobs.extend(map(_logprobs_message, event.logprobs))
        return generation.GenerateResponse(stream_id=stream_id, tokens=tokens)
    if isinstance(event, Started):
        started = generation.Started(model=event.model, num_prompt_tokens=event.num_prompt_tokens, seed=event.seed)
        return generation.GenerateResponse(stream_id=stream_id, started=started)
    finished = generation.Finished(
        reason=_REASONS[event.reason], num_output_tokens=event.num_output_tokens, stats=_stats_message(event.stats)
    )
    return generation.GenerateResponse(stream_id=stream_id, finished=finished)


def _logprobs_message(one: TokenLogprobs | None) -> generation.TokenLogprobs:
    if one is None:
        return generation.TokenLogprobs()
    return generation.TokenLogprobs(logprob=one.logprob, top_ids=one.top_ids, top_logprobs=one.top_logprobs)


def _stats_message(stats: RequestStats) -> generation.RequestStats:
    return generation.RequestStats(
        ttft_s=stats.ttft_s,
        duration_s=stats.duration_s,
        num_cached_prompt_tokens=stats.num_cached_prompt_tokens,
        num_computed_prompt_tokens=stats.num_computed_prompt_tokens,
        num_recomputed_prompt_tokens=stats.num_recomputed_prompt_tokens,
        num_transferred_blocks=stats.num_transferred_blocks,
        prefill_worker_id=stats.prefill_worker_id,
        decode_worker_id=stats.decode_worker_id,
        num_replacements=stats.num_replacements,
        num_drafts=stats.num_drafts,
        num_draft_tokens=stats.num_draft_tokens,
        num_accepted_tokens=stats.num_accepted_tokens,
    )
