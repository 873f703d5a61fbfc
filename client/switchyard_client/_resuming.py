"""One stream as its client knows it, across routers: which call comes next, and what of it is new.

Decides and calls nothing but the stub that it is given: the waiting is left to the client.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import grpc

from switchyard_client._errors import error_of, trailers
from switchyard_client._messages import event_of, request_message
from switchyard_client._stubs import generation_pb2, generation_pb2_grpc
from switchyard_client._types import Event, Finished, GenerationRequest, PromptTokens, Started, Tokens

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.02, 1.0
_BEGIN_WITHIN_S = 5.0  # a router that restarts is back sooner; an address without a listener fails soon
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_NOT_MEANT = (None, "stopping", "journal_away")  # None: no router said anything


class ResumingStream:
    """Begun once at one of `targets`, resumed at the next one whenever its router is lost."""

    def __init__(
        self,
        request: GenerationRequest,
        targets: Sequence[str],
        resume_within_s: float,
        metadata: Sequence[tuple[str, str]],
    ) -> None:
        self._request = request_message(request)
        self._metadata = metadata
        self._targets = targets
        self._resume_within_s = resume_within_s
        self._deadline_s = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        self._known = generation_pb2.ResumeRequest()
        self._num_prompt_tokens = 0  # of PromptTokens that the caller has had
        self._num_losses = 0
        self._lost_s: float | None = None  # since when no router carries it
        self._pause_s = _FIRST_PAUSE_S
        self.is_finished = False

    @property
    def target(self) -> str:
        """The router to ask next."""
        return self._targets[self._num_losses % len(self._targets)]

    def call(self, stub: generation_pb2_grpc.GenerationServiceStub) -> Any:
        """Begin the stream, or go on with it."""
        left_s = None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())
        if self._known.stream_id:
            return stub.Resume(self._known, timeout=left_s, metadata=self._metadata)
        return stub.Generate(self._request, timeout=left_s, metadata=self._metadata)

    def take(self, message: generation_pb2.GenerateResponse) -> Event | None:
        """The event of a message; None when the caller has had it, or when this client does not know its kind."""
        event = event_of(message)
        self._lost_s, self._pause_s = None, _FIRST_PAUSE_S
        if isinstance(event, Started):
            is_new = not self._known.stream_id
            self._known.stream_id = event.stream_id
            return event if is_new else None
        if isinstance(event, PromptTokens):  # sent again when no token had come
            is_new = event.first_position >= self._num_prompt_tokens
            self._num_prompt_tokens = max(self._num_prompt_tokens, event.first_position + len(event.ids))
            return event if is_new else None
        if isinstance(event, Tokens):
            self._known.token_ids.ids.extend(event.ids)
            self._known.num_tokens += len(event.ids)
            self._known.has_rest = not event.ids and bool(event.text)
        self.is_finished = isinstance(event, Finished)
        return event

    def pause_after(self, error: grpc.RpcError) -> float:
        """How many seconds to wait before the next call. Raises GenerationError when there is to be none."""
        # A router that says why it failed a stream has made up its mind, unless it is only going down itself. One that
        # goes down without a word cancels what it still carries.
        is_router_lost = error.code() in _LOST and trailers(error).get("switchyard-error") in _NOT_MEANT
        now_s = time.monotonic()
        if self._lost_s is None:
            self._lost_s = now_s
        self._num_losses += 1
        lost_for_s = now_s - self._lost_s
        if self._known.stream_id:
            may_go_on = lost_for_s < self._resume_within_s
        else:  # no output was seen: the request can be repeated, on each router at least once
            begin_within_s = min(_BEGIN_WITHIN_S, self._resume_within_s)
            may_go_on = self._num_losses < len(self._targets) or lost_for_s < begin_within_s
        if not (is_router_lost and may_go_on):
            raise error_of(error) from None
        pause_s, self._pause_s = self._pause_s, min(_LAST_PAUSE_S, 2 * self._pause_s)
        return pause_s
