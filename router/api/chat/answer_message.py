"""OpenAI's chat message from what an answer says: whole, or delta by delta. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from router.events import Finished, FinishReason, Tokens
from router.parsers.deltas import CallStart, Content, Delta, Reasoning

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class MessageShape:
    """What a client wants to see of a message."""

    has_reasoning: bool = True
    is_deprecated: bool = False  # one function_call instead of tool_calls


@dataclass(slots=True)
class WholeCall:
    """One call with all of its arguments so far."""

    call_id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class WholeAnswer:
    """An answer's deltas put together."""

    content: str
    reasoning: str
    calls: list[WholeCall]


def put_together(deltas: Iterable[Delta]) -> WholeAnswer:
    """All deltas of an answer."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[WholeCall] = []
    for delta in deltas:
        if isinstance(delta, Content):
            content.append(delta.text)
        elif isinstance(delta, Reasoning):
            reasoning.append(delta.text)
        elif isinstance(delta, CallStart):
            calls.append(WholeCall(delta.call_id, delta.name))
        else:
            calls[delta.index].arguments += delta.text
    return WholeAnswer("".join(content), "".join(reasoning), calls)


def deltas_of(event: Tokens) -> Iterable[Delta]:
    """What an event says; where nothing is parsed, its text is content."""
    if event.deltas is not None:
        return event.deltas
    return (Content(event.text),) if event.text else ()


def whole_message(events: Iterable[Tokens], shape: MessageShape) -> Json:
    """The message of a whole answer."""
    answer = put_together(delta for event in events for delta in deltas_of(event))
    has_reasoning = bool(answer.reasoning) and shape.has_reasoning
    content = answer.content or (None if answer.calls or has_reasoning else "")
    message: Json = {"role": "assistant", "content": content}
    if has_reasoning:
        message |= _reasoning(answer.reasoning)
    calls = [{"name": call.name, "arguments": call.arguments} for call in answer.calls]
    if calls and shape.is_deprecated:
        message["function_call"] = calls[0]
    elif calls:
        message["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": function}
            for call, function in zip(answer.calls, calls, strict=True)
        ]
    return message


def delta_message(deltas: Iterable[Delta], shape: MessageShape) -> Json:
    """What one event says, as one delta of a message; empty where the client wants nothing of it.

    One delta, not several: a client that resumes has an event whole or not at all.
    """
    message: Json = {}
    calls: dict[int, Json] = {}
    for delta in deltas:
        if isinstance(delta, Content):
            message["content"] = message.get("content", "") + delta.text
        elif isinstance(delta, Reasoning):
            if shape.has_reasoning:
                message |= _reasoning(message.get("reasoning", "") + delta.text)
        elif isinstance(delta, CallStart):
            function = {"name": delta.name, "arguments": ""}
            calls[delta.index] = {"index": delta.index, "id": delta.call_id, "type": "function", "function": function}
        else:
            call = calls.setdefault(delta.index, {"index": delta.index, "function": {"arguments": ""}})
            call["function"]["arguments"] += delta.text
    if calls and not shape.is_deprecated:
        message["tool_calls"] = list(calls.values())
    elif 0 in calls:
        message["function_call"] = calls[0]["function"]
    return message


def finish_reason(finished: Finished, shape: MessageShape) -> str:
    """Why the answer ended, in OpenAI's words."""
    if finished.num_calls and finished.reason is FinishReason.STOP:
        return "function_call" if shape.is_deprecated else "tool_calls"
    return finished.reason.value


def _reasoning(text: str) -> Json:
    # The first name is older and most clients read it; vLLM's newer name is the second.
    return {"reasoning_content": text, "reasoning": text}
