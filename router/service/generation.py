"""One request from the client's words to the stream's events: check, admit, encode, dispatch, decode, count.

What both APIs call. Every request that comes in here is counted once, with exactly one outcome. Knows nothing of
protobuf or HTTP, nor where a stream runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from kvstore.control.journal import JournalEntry
from router.config import RouterConfig
from router.errors import (
    InvalidRequest,
    NoWorker,
    Overloaded,
    PromptTooLarge,
    RouterError,
    UnknownModel,
    UnknownStream,
    mark_counted,
    stopping,
)
from router.events import Event, Finished, FinishReason, GenerationRequest, RequestStats, ResumeRequest, Started, Tokens
from router.fleet.fleet import BlockNames, KvLayout, name_blocks
from router.fleet.identity import ServedIdentity
from router.fleet.messages import journal_header, journal_record
from router.model_files import ModelFiles
from router.sampling import (
    check_choice_is_left,
    check_repeated_sampling,
    check_sampling,
    check_text,
    check_token_ids,
)
from router.service.admission import Admission
from router.service.chat import ChatTemplate
from router.service.checks import (
    check_priority,
    check_prompt,
    check_repeated_prompt,
    check_resumption,
    check_salt,
)
from router.service.defaults import end_token_ids, settled, with_spelled_words
from router.service.dispatch import Dispatcher, LiveStream
from router.service.journal import JournalWriter, StreamLog
from router.service.text import TextCodec
from router.service.text_out import TextOut
from router.service.token_request import TokenRequest, block_salt

log = logging.getLogger(__name__)

_INLINE_BYTES = 16 * 1024  # shorter prompts are encoded at once, longer ones in a thread
_ENCODE_THREADS = 2
_FROM_THE_START = ResumeRequest(stream_id="", num_tokens=0)


@dataclass(slots=True)
class Account:
    """What is known of a request when it has ended."""

    outcome: str = "internal_error"  # a FinishReason's value or a RouterError's code
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    stats: RequestStats = dataclasses.field(default_factory=RequestStats)


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
    ) -> None:
        self.files = files
        self._served = served
        self._journal = journal
        self.admission = Admission(config.max_inflight_requests, config.max_prompt_bytes)
        self.codec = TextCodec(files.tokenizer_json)
        self._chat = _chat_template(files)
        self._end_token_ids = end_token_ids(files, self.codec, self._chat)
        self._config = config
        self._dispatcher = dispatcher
        self._observer = observer
        self._live: set[LiveStream] = set()
        self._threads = ThreadPoolExecutor(_ENCODE_THREADS, thread_name_prefix="encode")

    @property
    def can_resume(self) -> bool:
        """Whether streams are written down at all."""
        return self._journal.is_kept

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and completion together: the model's limit, or a lower one of a worker."""
        limit = self._dispatcher.fleet.context_tokens
        return self.files.context_tokens if limit is None else min(limit, self.files.context_tokens)

    def check_model(self, name: str) -> None:
        """Raise UnknownModel unless that name (or an empty one) means the model served here."""
        if name not in ("", self.files.name):
            raise UnknownModel(f"model: {name!r} is not served here; {self.files.name!r} is", param="model")

    @property
    def chat_uses_clock(self) -> bool:
        """Whether the same messages may make another prompt later."""
        return self._chat is not None and self._chat.uses_clock

    def render_chat(self, messages: Sequence[Mapping[str, object]], options: Mapping[str, object]) -> str:
        """The prompt that the model's chat template makes of these messages and options."""
        if self._chat is None:
            raise InvalidRequest(f"messages: model {self.files.name!r} has no chat template", param="messages")
        return self._chat.render(messages, options)

    def text_of(self, prompt: str | Sequence[int]) -> str:
        """A prompt as text. Its ids, if it has some, were checked."""
        return prompt if isinstance(prompt, str) else self.codec.decode(prompt)

    async def tokenize(
        self, model: str, text: str, add_special_tokens: bool = True, param: str = "text"
    ) -> Sequence[int]:
        """Ids of a text, as a prompt would be encoded. param: the field that it came in."""
        self.check_model(model)
        with self._admitted(check_text(param, text), param):
            return (await self._encode(text, add_special_tokens, frozenset(), b""))[0]

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of ids, special tokens as they are spelled. Raises InvalidRequest."""
        check_token_ids("tokens", token_ids, self.files.vocab_size)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.codec.spelled, token_ids)

    async def stream(self, request: GenerationRequest, commits_first: bool = False) -> AsyncGenerator[Event, None]:
        """Started, then Tokens, then Finished; or a RouterError. A caller that stops reading early must close it.

        commits_first: no token comes before the journal has it, for clients that cannot say what they have.
        """
        with self._accounted() as account, self._admitted(self._check(request)):
            await self._know_weights()
            order = await self._order(request)
            account.num_prompt_tokens = len(order.token_ids)
            deadline_unix_s = None if order.deadline_s is None else order.deadline_s - order.arrived_s + time.time()
            settled = dataclasses.replace(
                request, prompt=tuple(order.token_ids), sampling=order.sampling, model=self.files.name
            )
            header = journal_header(settled, self._served.now, deadline_unix_s)
            log = self._journal.open(order.stream_id, header)
            async with contextlib.aclosing(self._carry(order, log, _FROM_THE_START, account, commits_first)) as events:
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
            if first.sampling.logprobs is not None:
                log.cut(request.num_tokens)  # the journal has no logprobs: its tokens are chosen again, with them
            order = await self._order(first)
            order = dataclasses.replace(
                order,
                weights=served.weights,
                # To workers it is another stream: nothing that they still say of the earlier one can be taken for this.
                stream_id=f"{request.stream_id}.{entry.epoch}",
                deadline_s=None if deadline_unix_s is None else order.arrived_s + deadline_unix_s - time.time(),
            )
            account.num_prompt_tokens = len(order.token_ids)
            async with contextlib.aclosing(self._carry(order, log, request, account, commits_first)) as events:
                async for event in events:
                    yield event

    async def _carry(
        self, order: TokenRequest, log: StreamLog, given: ResumeRequest, account: Account, commits_first: bool
    ) -> AsyncGenerator[Event, None]:
        """The events of a stream that the client lacks; its log holds what is known of it already."""
        sampling = order.sampling
        assert sampling.seed is not None, "the seed is set before a stream is opened"
        assert sampling.max_tokens is not None, "max_tokens is set before a stream is opened"
        text = TextOut(self.codec.detokenizer(order.token_ids), sampling)
        text.push(0, log.token_ids[: given.num_tokens])
        account.num_output_tokens = given.num_tokens
        live = self._dispatcher.open(order, log.token_ids, given.num_tokens)
        self._live.add(live)
        try:
            is_complete = bool(log.ending) or text.is_stopped or len(log.token_ids) == sampling.max_tokens
            if not is_complete:
                await live.start()
            await log.committed()
            yield Started(log.stream_id, self.files.name, account.num_prompt_tokens, sampling.seed)
            while not text.is_stopped:
                ids = log.token_ids[account.num_output_tokens :] if is_complete else await live.next()
                if not ids:
                    break
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
            if text.is_stopped:
                live.finish()
            if (rest := text.finish()) and not given.has_rest:
                yield Tokens(account.num_output_tokens, (), rest)
            if text.is_stopped:
                reason = FinishReason.STOP
            elif is_complete:
                reason = FinishReason(log.ending or FinishReason.LENGTH.value)
            else:
                reason = live.reason
            log.end(reason.value)
            await log.committed()
            account.outcome = reason.value
            yield Finished(reason, account.num_output_tokens, live.stats())
        finally:
            log.close()
            live.close()
            self._live.discard(live)
            account.stats = live.stats()

    def end_streams(self) -> None:
        """The router stops and waits no longer: what runs fails as Stopping; another router can go on with it."""
        for live in tuple(self._live):
            live.fail(stopping())

    def close(self) -> None:
        """Give up the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check(self, requests: Sequence[GenerationRequest]) -> None:
        """Raise for the first of several that cannot be meant, before any of them begins; counted as one refusal."""
        try:
            for request in requests:
                self._check(request)
        except RouterError as error:
            self._observer.ended(Account(outcome=error.code))
            mark_counted(error)
            raise

    # -- steps

    async def _know_weights(self) -> None:
        """A stream is begun, and gone on with, by the same weights only; they are known when a worker has come."""
        if not await self._served.known(self._config.new_request_wait_s):
            raise NoWorker("no worker has come since this router started", retry_after_s=1.0)

    def _check(self, request: GenerationRequest) -> int:
        """All that can be said before encoding; the prompt's size in bytes."""
        self.check_model(request.model)
        check_sampling(request.sampling, self.files.vocab_size)
        check_salt(request.cache_salt)
        check_priority(request.priority)
        if isinstance(request.prompt, str):
            return check_text("prompt", request.prompt)
        check_prompt(len(request.prompt), self.context_tokens)
        check_token_ids("prompt", request.prompt, self.files.vocab_size)
        return 4 * len(request.prompt)

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
        check_resumption(request, entry.token_ids, self.files.vocab_size)
        return entry

    async def _check_repeated(self, request: GenerationRequest, begun: GenerationRequest) -> None:
        """Raise InvalidRequest when a client resumes one stream with the request of another."""
        if not request.prompt_uses_clock:
            token_ids, _ = await self._encode(request.prompt, request.add_special_tokens, frozenset(), b"")
            check_repeated_prompt(token_ids, begun.prompt)
        check_repeated_sampling(request.sampling, begun.sampling)

    async def _order(self, request: GenerationRequest) -> TokenRequest:
        arrived_s = self._dispatcher.clock()
        context_tokens = self.context_tokens
        layouts = self._dispatcher.fleet.layouts
        if isinstance(request.prompt, str):
            num_tokens = max(1, self.codec.min_tokens(len(request.prompt.encode())))
            check_prompt(num_tokens, context_tokens, is_bound=True)
        salt = block_salt(request.tenant_salt, request.cache_salt)
        token_ids, names = await self._encode(request.prompt, request.add_special_tokens, layouts, salt)
        check_prompt(len(token_ids), context_tokens)
        check_token_ids("prompt", token_ids, self.files.vocab_size)
        num_tokens_left = context_tokens - len(token_ids)
        asked = with_spelled_words(request.sampling, self.codec)
        end_ids = (*self._end_token_ids, *self.files.eos_token_ids)
        check_choice_is_left(asked, end_ids, self.files.vocab_size)
        seed = secrets.randbits(53)  # 53: exact in any JSON reader
        return TokenRequest(
            stream_id=secrets.token_hex(12),
            token_ids=token_ids,
            sampling=settled(asked, self.files.sampling_defaults, self._end_token_ids, seed, num_tokens_left),
            names=names,
            arrived_s=arrived_s,
            deadline_s=self._deadline_s(request, arrived_s),
            tenant_salt=salt,
            tenant=request.tenant_salt,
            priority=request.priority,
            weights=self._served.now.weights,
        )

    def _deadline_s(self, request: GenerationRequest, now_s: float) -> float | None:
        limits = [request.deadline_s, self._config.request_timeout_s or None]
        set_limits = [limit for limit in limits if limit is not None]
        return now_s + min(set_limits) if set_limits else None

    async def _encode(
        self, prompt: str | tuple[int, ...], add_special_tokens: bool, layouts: frozenset[KvLayout], tenant_salt: bytes
    ) -> tuple[Sequence[int], BlockNames]:
        """Ids and block names of a prompt; those of a long one in a thread, so that other streams get their tokens."""

        def encode() -> tuple[Sequence[int], BlockNames]:
            ids = self.codec.encode(prompt, add_special_tokens) if isinstance(prompt, str) else prompt
            return ids, name_blocks(layouts, ids, tenant_salt)

        if len(prompt) < _INLINE_BYTES // 4:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)

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


def _chat_template(files: ModelFiles) -> ChatTemplate | None:
    if not files.chat_template:
        return None
    return ChatTemplate(files.chat_template, files.special_tokens, files.chat_template_where)
