"""One request from the client's words to the stream's events: check, admit, encode, dispatch, decode, count.

What both APIs call. Every request that comes in here is counted once, with exactly one outcome. Knows nothing of
protobuf or HTTP, nor where a stream runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.control.journal import JournalEntry
from router.adapters.catalog import AdapterCatalog
from router.config import RouterConfig
from router.errors import (
    NoWorker,
    Overloaded,
    PromptTooLarge,
    RouterError,
    UnknownStream,
    mark_counted,
    stopping,
)
from router.events import (
    Embedding,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Pooling,
    PromptTokens,
    RequestStats,
    ResumeRequest,
    Started,
)
from router.fleet.identity import ServedIdentity
from router.fleet.messages import journal_header, journal_record
from router.model_files import ModelFiles
from router.sampling import (
    check_repeated_sampling,
    check_text,
)
from router.service.admission import Admission
from router.service.chat import ChatModel
from router.service.checks import (
    check_repeated_model,
    check_repeated_prompt,
    check_resumption,
)
from router.service.defaults import end_token_ids
from router.service.dispatch import Dispatcher
from router.service.embedding import embed
from router.service.journal import JournalWriter, StreamLog
from router.service.live_stream import LiveStream
from router.service.preparation import Preparation, PreparationContext
from router.service.text import TextCodec
from router.service.text_out import TextOut
from router.service.token_request import TokenRequest

log = logging.getLogger(__name__)

_PROMPT_TOKENS_AT_ONCE = 1024
_FROM_THE_START = ResumeRequest(stream_id="", num_tokens=0)


@dataclass(slots=True)
class Account:
    """What is known of a request when it has ended."""

    outcome: str = "internal_error"  # a FinishReason's value or a RouterError's code
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    stats: RequestStats = dataclasses.field(default_factory=RequestStats)
    model: str = ""  # name of the model or adapter that it was answered with; empty until that is known
    is_adapter: bool = False

    def begin(self, order: TokenRequest, base: str) -> None:
        """The request was prepared. base: name of the model without an adapter."""
        self.num_prompt_tokens = len(order.token_ids)
        self.is_adapter = order.adapter is not None
        self.model = base if order.adapter is None else order.adapter.name


class RequestObserver(Protocol):
    """Who counts."""

    def ended(self, account: Account) -> None: ...

    def gave_tokens(self, num_tokens: int) -> None: ...

    def resumed(self) -> None: ...


class Generation:
    """The service behind the APIs."""

    def __init__(
        self,
        files: ModelFiles,
        served: ServedIdentity,
        config: RouterConfig,
        dispatcher: Dispatcher,
        journal: JournalWriter,
        observer: RequestObserver,
        adapters: AdapterCatalog,
    ) -> None:
        self._served = served
        self.adapters = adapters
        self._journal = journal
        self.admission = Admission(config.max_inflight_requests, config.max_prompt_bytes)
        self.files, self.codec = files, TextCodec(files.tokenizer_json)
        self.chat = ChatModel(files, self.codec)
        end_ids = end_token_ids(files, self.codec, self.chat.template)
        timeout_s = config.request_timeout_s
        self.preparation = Preparation(
            PreparationContext(files, self.codec, end_ids, dispatcher.fleet, dispatcher.clock, timeout_s, adapters)
        )
        self._config = config
        self._dispatcher = dispatcher
        self._observer = observer
        self._live: set[LiveStream] = set()

    @property
    def can_resume(self) -> bool:
        """Whether streams are written down at all."""
        return self._journal.is_kept

    def text_of(self, prompt: str | Sequence[int]) -> str:
        """A prompt as text. Its ids, if it has some, were checked."""
        return prompt if isinstance(prompt, str) else self.codec.decode(prompt)

    async def tokenize(
        self, model: str, text: str, add_special_tokens: bool = True, param: str = "text"
    ) -> Sequence[int]:
        """Ids of a text, as a prompt would be encoded. param: the field that it came in."""
        await self.preparation.check_model(model)
        with self._admitted(check_text(param, text), param):
            return (await self.preparation.encode(text, add_special_tokens))[0]

    async def stream(self, request: GenerationRequest, commits_first: bool = False) -> AsyncGenerator[Event, None]:
        """Started, then Tokens, then Finished; or a RouterError. A caller that stops reading early must close it.

        commits_first: no token comes before the journal has it, for clients that cannot say what they have.
        """
        with self._accounted() as account, self._admitted(self.preparation.check(request)):
            request = await self.preparation.with_adapter(request)
            await self._know_weights()
            order = await self.preparation.order(request, self._served.now.weights)
            account.begin(order, self.files.name)
            deadline_unix_s = None if order.deadline_s is None else order.deadline_s - order.arrived_s + time.time()
            settled = dataclasses.replace(
                request, prompt=tuple(order.token_ids), sampling=order.sampling, model=account.model
            )
            header = journal_header(settled, self._served.now, deadline_unix_s)
            log = self._journal.open(order.stream_id, header)
            text = self._text_out(order, request, log.stream_id)
            carried = self._carry(order, log, text, _FROM_THE_START, account, commits_first)
            async with contextlib.aclosing(carried) as events:
                async for event in events:
                    yield event

    async def resume(self, request: ResumeRequest, commits_first: bool = False) -> AsyncGenerator[Event, None]:
        """The rest of a stream that this or another router began: Started again, then what the client lacks."""
        with self._accounted() as account, self._admitted(0):
            await self._know_weights()
            # Read before the claim: a refused request must not take the stream from its router.
            begun = self._check_resumption(request, await self._journal.look_up(request.stream_id))
            if request.repeated is not None:
                await self._check_repeated(request.repeated, journal_record(begun.header)[0])
            entry = self._check_resumption(request, await self._journal.claim(request.stream_id))
            self._observer.resumed()
            log = self._journal.adopt(request.stream_id, entry)
            if not log.ending:
                log.add(0, request.token_ids)
            first, served, deadline_unix_s = journal_record(entry.header)
            wants_prompt_logprobs = first.sampling.prompt_logprobs is not None and request.num_tokens == 0
            if first.sampling.logprobs is not None or wants_prompt_logprobs:
                log.cut(request.num_tokens)  # the journal has no logprobs: its tokens are chosen again, with them
            order = await self.preparation.order(first, self._served.now.weights)
            order = dataclasses.replace(
                order,
                weights=served.weights,
                # To workers it is another stream: nothing that they still say of the earlier one can be taken for this.
                stream_id=f"{request.stream_id}.{entry.epoch}",
                deadline_s=None if deadline_unix_s is None else order.arrived_s + deadline_unix_s - time.time(),
            )
            account.begin(order, self.files.name)
            text = self._text_out(order, request.repeated or first, log.stream_id)
            async with contextlib.aclosing(self._carry(order, log, text, request, account, commits_first)) as events:
                async for event in events:
                    yield event

    async def _carry(
        self,
        order: TokenRequest,
        log: StreamLog,
        text: TextOut,
        given: ResumeRequest,
        account: Account,
        commits_first: bool,
    ) -> AsyncGenerator[Event, None]:
        """The events of a stream that the client lacks; its log holds what is known of it already."""
        sampling = order.sampling
        assert sampling.seed is not None, "the seed is set before a stream is opened"
        assert sampling.max_tokens is not None, "max_tokens is set before a stream is opened"
        text.push(0, log.token_ids[: given.num_tokens])
        account.num_output_tokens = given.num_tokens
        live = self._dispatcher.open(order, log.token_ids, given.num_tokens)
        self._live.add(live)
        try:
            is_complete = bool(log.ending) or text.is_stopped or len(log.token_ids) == sampling.max_tokens
            if not is_complete:
                await live.start()
            await log.committed()
            yield Started(log.stream_id, account.model, account.num_prompt_tokens, sampling.seed)
            while not text.is_stopped:
                ids = log.token_ids[account.num_output_tokens :] if is_complete else await live.next()
                if not ids:
                    break
                for prompt_tokens in _prompt_tokens(order, live):
                    yield prompt_tokens
                tokens = text.push(account.num_output_tokens, ids)
                if sampling.logprobs is not None:
                    logprobs = live.take_logprobs(tokens.first_position, len(tokens.ids))
                    tokens = dataclasses.replace(tokens, logprobs=logprobs)
                account.num_output_tokens += len(tokens.ids)
                log.add(tokens.first_position, tokens.ids)
                if commits_first:
                    await log.committed()
                self._observer.gave_tokens(len(tokens.ids))
                yield tokens
            for prompt_tokens in _prompt_tokens(order, live):  # of a stream that ended before its first token
                yield prompt_tokens
            if text.is_stopped:
                live.finish()
            rest = text.finish(account.num_output_tokens)
            if (rest.text or rest.deltas) and not given.has_rest:
                yield rest
            if text.is_stopped:
                reason = FinishReason.STOP
            elif is_complete:
                reason = FinishReason(log.ending or FinishReason.LENGTH.value)
            else:
                reason = live.reason
            log.end(reason.value)
            await log.committed()
            account.outcome = reason.value
            yield Finished(reason, account.num_output_tokens, live.stats(), text.num_reasoning_tokens, text.num_calls)
        finally:
            log.close()
            live.close()
            self._live.discard(live)
            account.stats = live.stats()

    async def embed(self, request: GenerationRequest, pooling: Pooling) -> Embedding:
        """The embedding of a prompt, as the model gives it. Raises RouterError."""
        with self._accounted() as account, self._admitted(self.preparation.check(request)):
            request = await self.preparation.with_adapter(request)
            await self._know_weights()
            order = await self.preparation.order(request, self._served.now.weights)
            account.begin(order, self.files.name)
            embedding = await embed(self._dispatcher, order, pooling)
            account.outcome = FinishReason.STOP.value
            return embedding

    def end_streams(self) -> None:
        """The router stops and waits no longer: what runs fails as Stopping; another router can go on with it."""
        for live in tuple(self._live):
            live.fail(stopping())

    def close(self) -> None:
        """Give up the threads."""
        self.preparation.close()

    def check(self, requests: Sequence[GenerationRequest]) -> None:
        """Raise for the first of several that cannot be meant, before any of them begins; counted as one refusal."""
        try:
            for request in requests:
                self.preparation.check(request)
        except RouterError as error:
            self._observer.ended(Account(outcome=error.code))
            mark_counted(error)
            raise

    # -- steps

    def _text_out(self, order: TokenRequest, request: GenerationRequest, stream_id: str) -> TextOut:
        """Shows the markers that a parser needs to see, and hides them behind it."""
        if request.answer is None:
            return TextOut(self.codec.detokenizer(order.token_ids), order.sampling)
        markers = self.codec.special_markers(request.answer.markers)
        parser = request.answer.parser(stream_id, markers.values())
        return TextOut(self.codec.detokenizer(order.token_ids, markers), order.sampling, parser)

    async def _know_weights(self) -> None:
        """A stream is begun, and gone on with, by the same weights only; they are known when a worker has come."""
        if not await self._served.known(self._config.new_request_wait_s):
            raise NoWorker("no worker has come since this router started", retry_after_s=1.0)

    def _check_resumption(self, request: ResumeRequest, entry: JournalEntry | None) -> JournalEntry:
        unknown = f"stream_id: {request.stream_id!r} is not known here, or ended too long ago"
        if entry is None:
            raise UnknownStream(unknown, param="stream_id")
        begun, served, _ = journal_record(entry.header)
        if begun.tenant_salt != request.tenant_salt:
            raise UnknownStream(unknown, param="stream_id")
        if difference := self._served.now.difference(served):
            # Its tokens are another model's: what followed them would be an answer that neither gives.
            message = f"stream_id: {request.stream_id!r} was begun where something else is served: {difference}"
            raise UnknownStream(message, param="stream_id")
        if begun.adapter is not None and not self.adapters.is_enabled:
            message = f"stream_id: {request.stream_id!r} was begun with an adapter, and none are served here"
            raise UnknownStream(message, param="stream_id")
        check_resumption(request, entry.token_ids, self.files.vocab_size)
        return entry

    async def _check_repeated(self, request: GenerationRequest, begun: GenerationRequest) -> None:
        """Raise InvalidRequest when a client resumes one stream with the request of another."""
        check_repeated_model(request.model or self.files.name, begun.model)
        if not request.prompt_uses_clock:
            token_ids, _ = await self.preparation.encode(request.prompt, request.add_special_tokens)
            check_repeated_prompt(token_ids, begun.prompt)
        check_repeated_sampling(request.sampling, begun.sampling)

    # -- bookkeeping

    @contextlib.contextmanager
    def _admitted(self, num_prompt_bytes: int, param: str = "prompt") -> Iterator[None]:
        refusal = self.admission.admit(num_prompt_bytes)
        if refusal is not None:
            if refusal.reason == "prompt_bytes":
                raise PromptTooLarge(f"{param}: {refusal.message}", param=param)
            if refusal.reason == "stopping":
                raise stopping()
            raise Overloaded(refusal.message, retry_after_s=refusal.retry_after_s)
        since_s = self._dispatcher.clock()
        try:
            yield
        finally:
            self.admission.leave(self._dispatcher.clock() - since_s)

    @contextlib.contextmanager
    def _accounted(self) -> Iterator[Account]:
        account = Account()
        try:
            yield account
        except Exception as error:
            account.outcome = error.code if isinstance(error, RouterError) else account.outcome
            mark_counted(error)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            # A reader that stops after Finished has all it came for.
            account.outcome = "cancelled" if account.outcome == "internal_error" else account.outcome
            raise
        finally:
            self._observer.ended(account)


def _prompt_tokens(order: TokenRequest, live: LiveStream) -> Iterator[PromptTokens]:
    """Where a request asks for them: once, in parts that fit any message."""
    logprobs = live.take_prompt_logprobs()
    for first in range(0, len(logprobs), _PROMPT_TOKENS_AT_ONCE):
        part = slice(first, first + _PROMPT_TOKENS_AT_ONCE)
        yield PromptTokens(first, tuple(order.token_ids[part]), tuple(logprobs[part]))
