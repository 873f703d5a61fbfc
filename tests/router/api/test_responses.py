"""POST /v1/responses with the openai client, over a real router; a fake worker says what a model would say."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.api.chat.answer_message import put_together
from router.api.openai.options import Use
from router.api.responses import options
from router.api.responses.items import messages_of
from router.api.responses.output import ResponseOutput
from router.api.responses.request import ResponsesRequest, parse_responses
from router.errors import InvalidRequest
from router.events import Finished, FinishReason, RequestStats, Started
from router.parsers.deltas import CallArguments, CallStart, Content, Delta, Reasoning
from router.service.text import TextCodec
from tests.router import chat_templates
from tests.router.chat_templates import HARMONY, HERMES
from tests.router.conftest import DEMO, MODEL, config_with, running_cluster, until
from tests.router.fake_worker import FakeWorker
from tests.router.saying import ARGUMENTS, MakeModel, saying

PAGE = Path(__file__).parents[3] / "docs" / "responses-options.md"
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
SAID = f'<think>\nWhere?\n</think>\n\nI look.<tool_call>{{"name": "get_weather", "arguments": {ARGUMENTS}}}</tool_call>'
ASKED: dict[str, Any] = {"model": MODEL, "input": "Weather?", "tools": [TOOL]}


def prompt_of(worker: FakeWorker) -> str:
    return TextCodec(DEMO / "tokenizer.json").decode(list(worker.submits[-1].token_ids))


def without_ids(output: list[Any]) -> list[dict[str, Any]]:
    """Items without what differs from one request to the next."""
    return [{key: value for key, value in item.model_dump().items() if key not in ("id", "call_id")} for item in output]


async def test_reasoning_text_and_a_call_are_items(make_model: MakeModel) -> None:
    async with saying(make_model(HERMES), SAID) as (client, worker, _):
        response = await client.responses.create(**ASKED, instructions="Be brief.", store=False)
        assert prompt_of(worker).startswith("system\n<tools>") or "<tools>" in prompt_of(worker)
        assert "Be brief." in prompt_of(worker)
    reasoning, message, call = response.output
    assert (reasoning.type, reasoning.content[0].text, reasoning.summary) == ("reasoning", "Where?", [])
    assert (message.type, message.role, message.content[0].text) == ("message", "assistant", "I look.")
    assert (call.type, call.name, call.arguments) == ("function_call", "get_weather", ARGUMENTS)
    assert [item.status for item in response.output] == ["completed"] * 3
    assert len({item.id for item in response.output}) == 3
    assert response.output_text == "I look."
    assert (response.status, response.object, response.store) == ("completed", "response", False)
    assert response.id.startswith("resp_")
    assert response.usage.output_tokens == len(worker.answer)
    assert response.usage.total_tokens == response.usage.input_tokens + len(worker.answer)
    assert response.usage.output_tokens_details.reasoning_tokens > 2
    assert (response.tools[0].name, response.tool_choice, response.instructions) == ("get_weather", "auto", "Be brief.")


async def test_a_stream_has_typed_numbered_events_in_order(make_model: MakeModel) -> None:
    async with saying(make_model(HERMES), SAID) as (client, _, _):
        whole = await client.responses.create(**ASKED)
        events = [event async for event in await client.responses.create(**ASKED, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [kind for at, kind in enumerate(kinds) if kinds[at - 1] != kind] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    last = events[-1].response
    assert without_ids(last.output) == without_ids(whole.output)
    assert (events[0].response.status, events[0].response.output, last.status) == ("in_progress", [], "completed")
    assert last.usage == whole.usage
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == last.output
    begun = [event.item for event in events if event.type == "response.output_item.added"]
    assert [(item.id, item.status) for item in begun] == [(item.id, "in_progress") for item in done]
    kinds = ("reasoning_text", "output_text", "function_call_arguments")
    for index, (item, kind) in enumerate(zip(done, kinds, strict=True)):
        mine = [event for event in events if getattr(event, "item_id", None) == item.id]
        assert {event.output_index for event in mine} == {index}
        text = "".join(event.delta for event in mine if event.type == f"response.{kind}.delta")
        assert text == (item.arguments if kind == "function_call_arguments" else item.content[0].text)


async def test_the_streaming_helper_of_the_client_understands_the_events(make_model: MakeModel) -> None:
    async with saying(make_model(HERMES), SAID) as (client, _, _), client.responses.stream(**ASKED) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_response()
    assert final.output_text == "I look."
    assert final.output[2].arguments == ARGUMENTS


async def test_the_output_goes_back_in_as_input(make_model: MakeModel) -> None:
    async with saying(make_model(HERMES), SAID) as (client, worker, _):
        first = await client.responses.create(**ASKED)
        call = first.output[-1]
        items = [
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            *(item.model_dump(exclude_none=True) for item in first.output),
            {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
        ]
        await client.responses.create(**{**ASKED, "input": items})
    prompt = prompt_of(worker)
    assert "Weather?" in prompt
    assert "Where?" in prompt
    assert '"name": "get_weather", "arguments": {"city": "Köln"}' in prompt
    assert "<tool_response>\nrain\n</tool_response>" in prompt


async def test_an_answer_that_is_cut_off_is_incomplete(make_model: MakeModel) -> None:
    async with saying(make_model(HERMES), "One two three four five six") as (client, _, _):
        response = await client.responses.create(model=MODEL, input="Count.", max_output_tokens=3)
        stream = await client.responses.create(model=MODEL, input="Count.", max_output_tokens=3, stream=True)
        events = [event async for event in stream]
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"
    assert events[-1].type == "response.incomplete"
    assert without_ids(events[-1].response.output) == without_ids(response.output)


async def test_a_failure_in_mid_stream_is_an_event(make_model: MakeModel) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.die_after = 5
    quick = config_with(replacement_wait_s=0.05, new_request_wait_s=0.05)
    async with (
        running_cluster(make_model(chat_templates.PLAIN), worker, config=quick) as cluster,
        openai.AsyncOpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = await client.responses.create(model=MODEL, input="x", stream=True, max_output_tokens=50)
        events = [event async for event in stream]
        with pytest.raises(openai.InternalServerError):
            await client.responses.create(model=MODEL, input="x")
    assert events[-1].type == "response.failed"
    assert (events[-1].response.status, events[-1].response.error.code) == ("failed", "server_error")


async def test_forms_and_required_calls_are_grammars(make_model: MakeModel) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    async with saying(make_model(HERMES), '{"a": 1}') as (client, worker, _):
        form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
        response = await client.responses.create(model=MODEL, input="x", text=form)
        assert '"integer"' in worker.submits[-1].sampling.grammar.lark
        assert response.text.format.name == "x"
        await client.responses.create(**ASKED, tool_choice={"type": "function", "name": "get_weather"})
        assert "get_weather" in worker.submits[-1].sampling.grammar.lark
        chosen = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_weather"}]}
        await client.responses.create(**ASKED, tool_choice=chosen)
        assert not worker.submits[-1].sampling.HasField("grammar")


async def test_sampling_options_reach_the_worker(make_model: MakeModel) -> None:
    options = {"top_k": 5, "seed": 7, "num_speculative_tokens": 0}
    async with saying(make_model(HERMES), "x") as (client, worker, _):
        await client.responses.create(model=MODEL, input="x", extra_body=options)
        sent = worker.submits[-1].sampling
        assert {name: getattr(sent, name) for name in options} == options
        await client.responses.create(model=MODEL, input="x")
        assert not worker.submits[-1].sampling.HasField("num_speculative_tokens")


async def test_the_effort_reaches_the_template(make_model: MakeModel) -> None:
    model = make_model(HARMONY + "{{ '<|' ~ (reasoning_effort or 'medium') ~ '|>' }}")
    async with saying(model, "<|channel|>final<|message|>x") as (client, worker, _):
        await client.responses.create(model=MODEL, input="x", reasoning={"effort": "high", "summary": "auto"})
        assert prompt_of(worker).endswith("<|high|>")
        await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], reasoning_effort="low"
        )
        assert prompt_of(worker).endswith("<|low|>")
    async with saying(make_model(HERMES), "x") as (client, worker, _):
        await client.responses.create(model=MODEL, input="x", reasoning={"effort": "none"})
        assert prompt_of(worker).endswith("assistant\n\n\n\n\n")  # closed reasoning, whose markers do not show
        await client.responses.create(model=MODEL, input="x", reasoning={"effort": "low"})
        assert prompt_of(worker).endswith("assistant\n")
        assert not prompt_of(worker).endswith("\n\n")
    async with saying(make_model(chat_templates.PLAIN), "x") as (client, _, _):
        with pytest.raises(openai.BadRequestError, match=r"reasoning\.effort: the chat template"):
            await client.responses.create(model=MODEL, input="x", reasoning={"effort": "low"})


NESTED: dict[str, Any] = {}
for _ in range(150):
    NESTED = {"properties": {"a": NESTED}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [5]}, "input.0"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
    ({"input": [{"type": "message", "content": "x"}]}, "input.0.role"),
    ({"input": [{"role": "king", "content": "x"}]}, "input.0.role"),
    ({"input": [{"role": "user"}]}, "input.0.content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0.type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0.text"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.0.call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "input.0.output"),
    ({"input": [{"type": "reasoning", "summary": [], "content": [{"type": "x"}]}]}, "input.0.content.0.type"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.name"),
    ({"tools": [TOOL, TOOL]}, "tools.1.name"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
    ({"tools": [TOOL], "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "x", "tools": []}}, "tool_choice.mode"),
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"num_speculative_tokens": 65}, "num_speculative_tokens"),
    ({"num_speculative_tokens": -1}, "num_speculative_tokens"),
    ({"num_speculative_tokens": "2"}, "num_speculative_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"$ref": "#/$defs/no"}}}}, "text.format"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"reasoning": {"effort": 5}}, "reasoning"),
    ({"tools": [{**TOOL, "x": "\ud800"}]}, "tools"),
    ({"text": {"format": {"type": "text", "name": "\ud800"}}}, "text"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": NESTED}}}, "text.format"),
    ({"tools": [{**TOOL, "parameters": {"properties": {"a": {"maximum": float("nan")}}}}]}, "tools"),
    ({"messages": []}, "messages"),
    ({"deadline_s": 0}, "deadline_s"),
]


async def test_wrong_requests_are_refused_by_name(make_model: MakeModel) -> None:
    async with (
        saying(make_model(HERMES), "x") as (client, worker, _),
        httpx.AsyncClient(base_url=str(client.base_url), timeout=20) as raw,
    ):
        for change, param in BAD:
            content = json.dumps({"model": MODEL, "input": "x", **change})
            answer = await raw.post("responses", content=content)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, param), error
        answer = await raw.post("responses", json={"model": "other", "input": "x"})
        assert answer.status_code == 404
    assert not worker.submits


def test_items_of_one_turn_are_one_message() -> None:
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    items = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "u"},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "s"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "t"}, {"type": "refusal", "refusal": "!"}]},
        call,
        {**call, "call_id": "b"},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "1"}]},
        {"type": "function_call_output", "call_id": "b", "output": "2"},
        {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"},
        {"role": "assistant", "content": "v"},
        {"role": "assistant", "content": "w"},
    ]
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in "ab"]
    assert messages_of(items, "i") == [
        {"role": "developer", "content": "i\n\nd"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "t!", "reasoning_content": "s", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "name": "f", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "name": "f", "content": "2"},
        {"role": "assistant", "content": "v"},
        {"role": "assistant", "content": "w"},
    ]


def test_the_page_and_the_fields_are_those_of_the_table() -> None:
    assert PAGE.read_text() == options.render(), "python -m router.api.responses.options > docs/responses-options.md"
    served = {option.name for option in options.OPTIONS if option.use is Use.SERVED}
    assert served == set(ResponsesRequest.model_fields)
    body = {"model": "m", "input": "x"}
    for option in options.NOT_SERVED.values():
        for value in (None, *(json.loads(text) for text in option.neutral)):
            parse_responses({**body, option.name: value})
        if option.use is Use.IGNORED:
            parse_responses({**body, option.name: {"x": 1}})
        else:
            with pytest.raises(InvalidRequest, match=option.note):
                parse_responses({**body, option.name: {"x": 1}})


async def test_a_client_that_disconnects_stops_its_response(make_model: MakeModel) -> None:
    async with (
        saying(make_model(chat_templates.PLAIN), "word " * 200) as (client, worker, _),
        httpx.AsyncClient(base_url=str(client.base_url), timeout=20) as raw,
    ):
        worker.step_s = 0.02
        for is_stream in (True, False):
            num_sent = worker.num_sent
            post = asyncio.create_task(raw.post("responses", json={"model": MODEL, "input": "x", "stream": is_stream}))
            await until(lambda num_sent=num_sent: worker.num_sent >= num_sent + 3, "it runs")
            post.cancel()
            await until(lambda: worker.num_live == 0, "the worker got the cancel")
            assert worker.num_sent < num_sent + len(worker.answer or ())


def delta_lists() -> st.SearchStrategy[list[Delta]]:
    """What a parser may say: arguments are those of the last call, which nothing comes between."""
    text = st.text("ab\n", min_size=1, max_size=3)
    call = st.tuples(st.just("f"), st.lists(text, max_size=3))
    parts = st.lists(st.one_of(text.map(Content), text.map(Reasoning), call), max_size=8)

    def spelled(said: list[Any]) -> list[Delta]:
        deltas: list[Delta] = []
        num_calls = 0
        for one in said:
            if isinstance(one, tuple):
                deltas.append(CallStart(num_calls, f"call{num_calls}", one[0]))
                deltas += [CallArguments(num_calls, piece) for piece in one[1]]
                num_calls += 1
            else:
                deltas.append(one)
        return deltas

    return parts.map(spelled)


@settings(deadline=None)
@given(delta_lists(), st.sampled_from(FinishReason))
def test_the_events_add_up_to_the_output(deltas: list[Delta], reason: FinishReason) -> None:
    output = ResponseOutput({}, created_at=0)
    events = [*output.started(Started("s", "m", 3, 1)), *output.said(deltas)]
    events += output.finished(Finished(reason, 5, RequestStats()), num_prompt_tokens=3)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert items == events[-1]["response"]["output"]
    for index, item in enumerate(items):
        mine = [event for event in events if event.get("output_index") == index]
        assert [mine[0]["type"], mine[-1]["type"]] == ["response.output_item.added", "response.output_item.done"]
        pieces = "".join(event["delta"] for event in mine if event["type"].endswith(".delta"))
        assert pieces == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
    said = put_together(deltas)
    kinds = {"message": said.content, "reasoning": said.reasoning}
    for kind, text in kinds.items():
        assert "".join(item["content"][0]["text"] for item in items if item["type"] == kind) == text
    calls = [(item["call_id"], item["arguments"]) for item in items if item["type"] == "function_call"]
    assert calls == [(call.call_id, call.arguments) for call in said.calls]
    assert events[-1]["type"] == ("response.completed" if reason is FinishReason.STOP else "response.incomplete")
