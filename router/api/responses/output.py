"""The output of a response, and the events that show how it grows, from what an answer says.

Items come one after the other: reasoning, a message, calls of functions. Pure; knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from router.events import Finished, FinishReason, Started
from router.parsers.deltas import CallStart, Content, Delta, Reasoning

Json = dict[str, Any]


class ResponseOutput:
    """One response. Every method that says something of it returns the events, in order and numbered."""

    def __init__(self, shown: Json, created_at: int) -> None:
        """shown: the request's fields, as a response repeats them."""
        self._shown = shown
        self._created_at = created_at
        self._id = ""
        self._items: list[Json] = []
        self._open: Json | None = None  # the last item, unless it is complete
        self._num_events = 0

    def started(self, event: Started) -> Sequence[Json]:
        """It is being made."""
        self._id = event.stream_id
        response = self.response("in_progress")
        return [self._event(f"response.{kind}", response=response) for kind in ("created", "in_progress")]

    def said(self, deltas: Iterable[Delta]) -> Sequence[Json]:
        """More came."""
        return [event for delta in deltas for event in self._said(delta)]

    def finished(self, event: Finished, num_prompt_tokens: int) -> Sequence[Json]:
        """Nothing follows; complete, or as long as it may be."""
        is_complete = event.reason is FinishReason.STOP
        events = self._close("completed" if is_complete else "incomplete")
        status = "completed" if is_complete else "incomplete"
        response = self.response(status) | {
            "incomplete_details": None if is_complete else {"reason": "max_output_tokens"},
            "usage": _usage(event, num_prompt_tokens),
        }
        return [*events, self._event(f"response.{status}", response=response)]

    def failed(self, code: str, message: str) -> Sequence[Json]:
        """It ended with an error."""
        response = self.response("failed") | {"error": {"code": code, "message": message}}
        return [self._event("response.failed", response=response)]

    def response(self, status: str) -> Json:
        """All of it so far."""
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": [dict(item) for item in self._items],
            "usage": None,
            **self._shown,
        }

    # -- items

    def _said(self, delta: Delta) -> Sequence[Json]:
        if isinstance(delta, Content):
            return self._add_text("message", delta.text)
        if isinstance(delta, Reasoning):
            return self._add_text("reasoning", delta.text)
        if isinstance(delta, CallStart):
            call = {"call_id": delta.call_id, "name": delta.name, "arguments": ""}
            return [*self._close("completed"), *self._begin("function_call", "fc", call)]
        assert self._open is not None, "arguments follow their call's start"
        self._open["arguments"] += delta.text
        return [self._item_event("response.function_call_arguments.delta", delta=delta.text)]

    def _begin(self, kind: str, prefix: str, fields: Json) -> Sequence[Json]:
        item = {"id": f"{prefix}_{self._id}_{len(self._items)}", "type": kind, "status": "in_progress", **fields}
        self._items.append(item)
        self._open = item
        return [self._event("response.output_item.added", output_index=len(self._items) - 1, item=_copied(item))]

    def _add_text(self, kind: str, text: str) -> Sequence[Json]:
        """Text of the message, or of the reasoning."""
        events: list[Json] = []
        if self._open is None or self._open["type"] != kind:
            prefix = "rs" if kind == "reasoning" else "msg"
            fields: Json = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
            events += self._close("completed")
            events += self._begin(kind, prefix, {**fields, "content": []})
            assert self._open is not None, "just begun"
            self._open["content"].append(_part(kind, ""))
            events.append(self._part_event("response.content_part.added", part=_part(kind, "")))
        assert self._open is not None, "begun above"
        self._open["content"][0]["text"] += text
        more: Json = {"logprobs": []} if kind == "message" else {}
        events.append(self._part_event(f"{_TEXT_EVENTS[kind]}.delta", delta=text, **more))
        return events

    def _close(self, status: str) -> Sequence[Json]:
        """The last item is complete, or cut off."""
        item = self._open
        if item is None:
            return []
        events = []
        if item["type"] == "function_call":
            said = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self._item_event("response.function_call_arguments.done", **said))
        else:
            (part,) = item["content"]
            more: Json = {"logprobs": []} if item["type"] == "message" else {}
            events.append(self._part_event(f"{_TEXT_EVENTS[item['type']]}.done", text=part["text"], **more))
            events.append(self._part_event("response.content_part.done", part=dict(part)))
        item["status"] = status
        self._open = None
        index = len(self._items) - 1
        events.append(self._event("response.output_item.done", output_index=index, item=_copied(item)))
        return events

    # -- events

    def _event(self, kind: str, **fields: object) -> Json:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event

    def _item_event(self, kind: str, **fields: object) -> Json:
        assert self._open is not None, "there is an item that this is of"
        return self._event(kind, item_id=self._open["id"], output_index=len(self._items) - 1, **fields)

    def _part_event(self, kind: str, **fields: object) -> Json:
        return self._item_event(kind, content_index=0, **fields)


_TEXT_EVENTS = {"message": "response.output_text", "reasoning": "response.reasoning_text"}


def _part(kind: str, text: str) -> Json:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _copied(item: Json) -> Json:
    """As it is now; its content grows."""
    return {**item, "content": [dict(part) for part in item["content"]]} if "content" in item else dict(item)


def _usage(event: Finished, num_prompt_tokens: int) -> Json:
    cached = {"cached_tokens": event.stats.num_cached_prompt_tokens, "cache_write_tokens": 0}
    return {
        "input_tokens": num_prompt_tokens,
        "input_tokens_details": cached,
        "output_tokens": event.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": event.num_reasoning_tokens},
        "total_tokens": num_prompt_tokens + event.num_output_tokens,
    }
