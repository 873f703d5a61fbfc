"""OpenAI's answers: one JSON body, or a stream of server-sent chunks, from the events of one or several streams.

Watches for a client that goes away, and stops everything at once. Knows the shape of the answers and ASGI; knows
nothing of how requests are checked or served.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from router.api import sse
from router.api.chat.answer_message import MessageShape, delta_message, deltas_of, finish_reason, whole_message
from router.api.choices import best, interleave
from router.api.openai.logprobs import BytesOf, LogprobsOut, prompt_logprobs
from router.errors import InvalidRequest, RouterError
from router.events import Event, Finished, PromptTokens, ResumeRequest, Started, Tokens

Json = dict[str, Any]

LAST_EVENT_ID = "Last-Event-ID"
"""The header by which a client that lost its connection says what it has (the HTML standard's server-sent events)."""


@dataclass(frozen=True, slots=True)
class AnswerStyle:
    """What the client asked for, beyond the tokens."""

    is_chat: bool
    is_stream: bool
    has_usage_chunk: bool
    has_token_ids: bool
    has_event_ids: bool  # the stream can be resumed
    model: str
    bytes_of: BytesOf  # for logprobs
    num_choices: int = 1  # of each prompt
    num_candidates: int = 1  # of each prompt; the best of them are shown
    echoes: Sequence[str] = ()  # the prompts' texts, to be shown before the completions; none: they are not
    has_logprobs: bool = False  # of the completion's tokens; and, where it is echoed, of the prompt's
    has_prompt_logprobs: bool = False  # in a field of their own
    message: MessageShape = field(default_factory=MessageShape)  # of a chat


@dataclass(slots=True)
class _Choice:
    """What came of one prompt so far."""

    started: Started | None = None
    prompt: list[PromptTokens] = field(default_factory=list)  # of a prompt's first choice, where they are asked for
    text: list[str] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)
    logprobs: LogprobsOut | None = None  # where the client asked for them
    has_rest: bool = False  # text came without ids, after the last token
    num_tokens: int = 0
    finished: Finished | None = None


class OpenAiAnswer(Response):
    """Runs the streams and answers, in the style asked for. A RouterError before the first byte is the caller's."""

    def __init__(self, streams: Sequence[AsyncGenerator[Event, None]], style: AnswerStyle) -> None:
        super().__init__()
        self._streams = streams
        self._style = style
        self._choices = [_Choice() for _ in streams]
        if style.has_logprobs:
            for choice in self._choices:
                choice.logprobs = LogprobsOut(style.bytes_of, style.is_chat)
        self._created = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._send_chunks(send) if self._style.is_stream else self._send_body(scope, receive, send)
        await sse.until_disconnect(work, receive)

    # -- one body

    async def _send_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(interleave(self._streams)) as events:
            async for index, event in events:
                self._note(index, event)
        body = self._envelope("chat.completion" if self._style.is_chat else "text_completion")
        body["choices"] = [self._whole_choice(index, choice) for index, choice in enumerate(self._shown_choices())]
        if self._style.has_prompt_logprobs and self._style.is_chat:
            body["prompt_logprobs"] = self._prompt_logprobs(0)
        body |= self._usage()
        await JSONResponse(body)(scope, receive, send)

    def _shown_choices(self) -> list[_Choice]:
        """The best of each prompt's candidates; all where none is left out."""
        n, num_candidates = self._style.num_choices, self._style.num_candidates
        if n == num_candidates:
            return self._choices
        shown = []
        for first in range(0, len(self._choices), num_candidates):
            candidates = self._choices[first : first + num_candidates]
            shown += [candidates[index] for index in best([choice.tokens for choice in candidates], n)]
        return shown

    def _prompt_logprobs(self, index: int) -> list[Json | None]:
        """Of the prompt of a choice that is shown."""
        first = self._choices[index // self._style.num_choices * self._style.num_candidates]
        return prompt_logprobs(first.prompt, self._style.bytes_of)

    def _echoed_logprobs(self, index: int, choice: _Choice) -> Json:
        assert choice.logprobs is not None, "asked where there are some"
        if not self._style.echoes:
            return {}
        first = self._choices[index // self._style.num_choices * self._style.num_candidates]
        return choice.logprobs.echoed(first.prompt)

    def _echo(self, index: int) -> str:
        """What is shown before the text of a choice."""
        return self._style.echoes[index // self._style.num_choices] if self._style.echoes else ""

    def _whole_choice(self, index: int, choice: _Choice) -> Json:
        assert choice.finished is not None, "a stream ended without Finished"
        shown: Json = {"text": self._echo(index) + "".join(choice.text)}
        if self._style.is_chat:
            shown = {"message": whole_message(choice.tokens, self._style.message)}
        logprobs = None
        if choice.logprobs is not None:
            echoed = self._echoed_logprobs(index, choice)
            logprobs = choice.logprobs.shown(choice.tokens)
            logprobs |= {name: [*values, *logprobs[name]] for name, values in echoed.items()}
        reason = finish_reason(choice.finished, self._style.message)
        whole: Json = {"index": index, **shown, "logprobs": logprobs, "finish_reason": reason}
        if self._style.has_token_ids:
            whole["token_ids"] = [token_id for tokens in choice.tokens for token_id in tokens.ids]
        if self._style.has_prompt_logprobs and not self._style.is_chat:
            whole["prompt_logprobs"] = self._prompt_logprobs(index)
        return whole

    # -- chunks

    async def _send_chunks(self, send: Send) -> None:
        is_open = False
        async with contextlib.aclosing(interleave(self._streams)) as events:
            try:
                async for index, event in events:
                    self._note(index, event)
                    if any(choice.started is None for choice in self._choices):
                        continue  # a status can still be chosen: until all streams have started, nothing is sent
                    if not is_open:
                        await sse.start(send)
                        is_open = True
                        for i, choice in enumerate(self._choices):
                            assert choice.started is not None, "looked at above"
                            await self._send_event(send, i, choice.started)
                    else:
                        await self._send_event(send, index, event)
            except RouterError as error:
                if not is_open:
                    raise
                await sse.send_data(send, error_body(error))
            else:
                if self._style.has_usage_chunk:
                    await sse.send_data(send, {**self._chunk([]), **self._usage()})
                await sse.send_raw(send, b"data: [DONE]\n\n")
        await sse.end(send)

    async def _send_event(self, send: Send, index: int, event: Event) -> None:
        for chunk in self._chunks(index, event):
            await sse.send_data(send, chunk, self._event_id())

    def _chunks(self, index: int, event: Event) -> Sequence[Json]:
        if isinstance(event, Started):
            if self._style.is_chat:
                return [self._delta(index, {"role": "assistant", "content": ""}, None)]
            if not (echo := self._echo(index)) or self._style.has_logprobs:
                return []  # an echo with logprobs waits for them
            return [self._delta(index, echo, None)]
        if isinstance(event, PromptTokens):
            return self._echo_chunks(index, event)
        if isinstance(event, Finished):
            reason = finish_reason(event, self._style.message)
            return [self._delta(index, {} if self._style.is_chat else "", reason)]
        logprobs = self._choices[index].logprobs
        shown = delta_message(deltas_of(event), self._style.message) if self._style.is_chat else event.text
        if not shown and not self._style.has_token_ids and logprobs is None:
            return []
        if self._style.is_chat:
            shown = shown or {"content": ""}
        delta = self._delta(index, shown, None, event.ids)
        if logprobs is not None and event.ids:
            delta["choices"][0]["logprobs"] = logprobs.shown([event])
        return [delta]

    def _echo_chunks(self, index: int, event: PromptTokens) -> Sequence[Json]:
        """Part of the prompt, for all of its choices; the text comes with the first part."""
        chunks = []
        for i in range(index, index + self._style.num_choices):
            logprobs = self._choices[i].logprobs
            assert logprobs is not None, "a stream has the prompt's tokens where it is echoed with logprobs"
            chunk = self._delta(i, self._echo(i) if event.first_position == 0 else "", None)
            chunk["choices"][0]["logprobs"] = logprobs.echoed([event])
            chunks.append(chunk)
        return chunks

    def _delta(self, index: int, shown: Json | str, reason: str | None, ids: Sequence[int] = ()) -> Json:
        key = "delta" if self._style.is_chat else "text"
        choice: Json = {"index": index, key: shown, "logprobs": None, "finish_reason": reason}
        if self._style.has_token_ids:
            choice["token_ids"] = list(ids)
        return self._chunk([choice])

    def _chunk(self, choices: Sequence[Json]) -> Json:
        kind = "chat.completion.chunk" if self._style.is_chat else "text_completion"
        chunk = {**self._envelope(kind), "choices": list(choices)}
        if self._style.has_usage_chunk:
            chunk["usage"] = None
        return chunk

    # -- both

    def _note(self, index: int, event: Event) -> None:
        choice = self._choices[index]
        if isinstance(event, Tokens):
            choice.num_tokens = event.first_position + len(event.ids)
            choice.has_rest = not event.ids
            if not self._style.is_stream:
                choice.text.append(event.text)
                choice.tokens.append(event)
        elif isinstance(event, Started):
            choice.started = event
        elif isinstance(event, PromptTokens):
            choice.prompt.append(event)
        else:
            choice.finished = event

    def _event_id(self) -> str:
        """What a client sends back as Last-Event-ID; empty where nothing can be resumed, as with several streams."""
        choice = self._choices[0]
        if not self._style.has_event_ids or len(self._choices) > 1 or choice.started is None:
            return ""
        return format_event_id(ResumeRequest(choice.started.stream_id, choice.num_tokens, has_rest=choice.has_rest))

    def _envelope(self, kind: str) -> Json:
        started = next((choice.started for choice in self._choices if choice.started is not None), None)
        prefix = "chatcmpl" if self._style.is_chat else "cmpl"
        stream_id = started.stream_id if started is not None else ""
        return {"id": f"{prefix}-{stream_id}", "object": kind, "created": self._created, "model": self._style.model}

    def _usage(self) -> Json:
        started = [choice.started for choice in self._choices if choice.started is not None]
        finished = [choice.finished for choice in self._choices if choice.finished is not None]
        # A prompt counts once, however many choices it has.
        num_prompt = sum(event.num_prompt_tokens for event in started[:: self._style.num_candidates])
        num_output = sum(event.num_output_tokens for event in finished)
        num_cached = sum(event.stats.num_cached_prompt_tokens for event in finished[:: self._style.num_candidates])
        usage = {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }
        if self._style.is_chat:
            num_reasoning = sum(event.num_reasoning_tokens for event in finished)
            usage["completion_tokens_details"] = {"reasoning_tokens": num_reasoning}
        # An extension: what each choice cost and where it ran.
        costs = [
            {"stream_id": start.stream_id, "seed": start.seed, **asdict(end.stats)}
            for start, end in zip(started, finished, strict=True)
        ]
        return {"usage": usage, "switchyard": costs}


def error_body(error: RouterError) -> Json:
    """OpenAI's error object."""
    kind = "invalid_request_error" if isinstance(error, InvalidRequest) else error.code
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def format_event_id(known: ResumeRequest) -> str:
    """The id of a server-sent event after which a client has so much of a stream."""
    return f"{known.stream_id}/{known.num_tokens}{'+' if known.has_rest else ''}"


def parse_event_id(event_id: str) -> ResumeRequest:
    """The reverse of format_event_id. Raises InvalidRequest."""
    stream_id, _, rest = event_id.rpartition("/")
    digits = rest.removesuffix("+")
    if not stream_id or not (digits.isascii() and digits.isdigit()) or len(digits) > 9:
        raise InvalidRequest(f"{LAST_EVENT_ID}: {event_id!r} is no event of this server", param=LAST_EVENT_ID)
    return ResumeRequest(stream_id, int(digits), has_rest=rest.endswith("+"))
