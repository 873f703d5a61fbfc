"""Tools and reasoning over HTTP with the openai client: a fake worker says what a model of the family would say."""

from __future__ import annotations

import json
import shutil
from typing import Any

import httpx
import openai
import pytest

from router.parsers.families import DEEPSEEK
from router.service.text import TextCodec
from tests.router import chat_templates
from tests.router.conftest import DEMO, MODEL
from tests.router.saying import ARGUMENTS, MakeModel, saying

THINKS = "<think>\nWhere?\n</think>\n\n"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Weather?"}]}
ASKED = {**CHAT, "tools": [TOOL]}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
HERMES = chat_templates.HERMES
MISTRAL = chat_templates.MISTRAL_WITH_TOOLS
HARMONY = chat_templates.HARMONY


async def streamed(client: openai.AsyncOpenAI, **body: Any) -> tuple[dict[str, Any], list[Any]]:
    """A streamed message put together as clients do, with its finish_reason; and the choices of the chunks."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": [], "finish_reason": None}
    choices = []
    async for chunk in await client.chat.completions.create(**body, stream=True):
        (choice,) = chunk.choices
        choices.append(choice)
        message["content"] += choice.delta.content or ""
        message["reasoning_content"] += (choice.delta.model_extra or {}).get("reasoning_content") or ""
        message["finish_reason"] = choice.finish_reason or message["finish_reason"]
        for call in choice.delta.tool_calls or ():
            if call.id is not None:
                assert call.index == len(message["tool_calls"])
                assert call.type == "function"
                message["tool_calls"].append([call.id, call.function.name, ""])
            else:
                assert call.function.name is None
            message["tool_calls"][call.index][2] += call.function.arguments
    return message, choices


async def test_a_call_comes_whole_and_streamed(make_model: MakeModel) -> None:
    said = THINKS + f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
    async with saying(make_model(HERMES), said) as (client, worker, _):
        answer = await client.chat.completions.create(**ASKED)
        message, choices = await streamed(client, **ASKED)
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "get_weather", ARGUMENTS)
    assert choice.message.content == message["content"] == "Let me see."
    assert choice.message.model_extra["reasoning_content"] == message["reasoning_content"] == "Where?"
    assert choice.message.model_extra["reasoning"] == "Where?"
    assert choice.finish_reason == message["finish_reason"] == "tool_calls"
    ((call_id, name, arguments),) = message["tool_calls"]
    assert (name, arguments) == ("get_weather", ARGUMENTS)
    assert call_id.startswith("call_")
    assert call_id != call.id
    assert sum(bool(choice.delta.tool_calls) for choice in choices) > 4, "the arguments come piece by piece"
    assert answer.usage.completion_tokens_details.reasoning_tokens == 2 + len(
        TextCodec(DEMO / "tokenizer.json").encode("\nWhere?\n", False)
    )
    prompt = TextCodec(DEMO / "tokenizer.json").decode(list(worker.submits[0].token_ids))
    assert json.dumps(TOOL, ensure_ascii=False) in prompt


async def test_two_calls_and_no_content(make_model: MakeModel) -> None:
    said = '[TOOL_CALLS] [{"name": "get_weather", "arguments": {}}, {"name": "get_weather", "arguments": {"a": 1}}]'
    async with saying(make_model(MISTRAL), said) as (client, worker, _):
        answer = await client.chat.completions.create(**ASKED)
        message, _ = await streamed(client, **ASKED)
        one = await client.chat.completions.create(**ASKED, parallel_tool_calls=False, max_tokens=500)
        again = [*ASKED["messages"], answer.choices[0].message.model_dump(exclude_none=True)]
        again += [
            {"role": "tool", "tool_call_id": call.id, "content": "rain"}
            for call in answer.choices[0].message.tool_calls
        ]
        await client.chat.completions.create(**{**ASKED, "messages": again})
    assert answer.choices[0].message.content is None
    assert message["content"] == ""
    assert [call[1:] for call in message["tool_calls"]] == [["get_weather", "{}"], ["get_weather", '{"a": 1}']]
    assert all(len(call.id) == 9 and call.id.isalnum() for call in answer.choices[0].message.tool_calls)
    assert len({call.id for call in answer.choices[0].message.tool_calls}) == 2
    assert len(one.choices[0].message.tool_calls) == 1
    assert one.choices[0].finish_reason == "tool_calls"
    assert one.usage.completion_tokens < answer.usage.completion_tokens
    prompt = TextCodec(DEMO / "tokenizer.json").decode(list(worker.submits[-1].token_ids))
    assert f'"call_id": "{answer.choices[0].message.tool_calls[1].id}"' in prompt


async def test_the_channels_of_gpt_oss(make_model: MakeModel) -> None:
    said = (
        "<|channel|>analysis<|message|>Where?<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
    )
    said += f"<|constrain|>json<|message|>{ARGUMENTS}"
    model = make_model(HARMONY)
    async with saying(model, said) as (client, _, _):
        message, _ = await streamed(client, **ASKED)
        silent = await client.chat.completions.create(**ASKED, extra_body={"include_reasoning": False})
    assert message["reasoning_content"] == "Where?"
    assert [call[1:] for call in message["tool_calls"]] == [["get_weather", ARGUMENTS]]
    assert "reasoning_content" not in silent.choices[0].message.model_extra
    async with saying(model, "<|channel|>final<|message|>Rain.") as (client, _, _):
        answer = await client.chat.completions.create(**CHAT)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Rain.", "stop")


@pytest.mark.parametrize("body", [CHAT, {**ASKED, "tool_choice": "none"}])
async def test_without_tools_a_call_is_text_and_the_prompt_has_none(make_model: MakeModel, body: Any) -> None:
    said = '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>'
    model = make_model(HERMES.replace("<|im_start|>", ""))
    shutil.copy(DEMO / "tokenizer.json", model / "tokenizer.json")  # the markers are plain text in it
    async with saying(model, said) as (client, worker, _):
        answer = await client.chat.completions.create(**body)
    assert answer.choices[0].message.content == said
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    assert "The weather" not in TextCodec(DEMO / "tokenizer.json").decode(list(worker.submits[0].token_ids))


async def test_an_answer_begins_in_the_reasoning_that_its_prompt_opened(make_model: MakeModel) -> None:
    model = make_model(HERMES + "{{ '<think>\\n' }}")
    async with saying(model, "Where?</think>There.") as (client, _, _):
        answer = await client.chat.completions.create(**CHAT)
        cut = await client.chat.completions.create(**CHAT, max_tokens=2)
    assert answer.choices[0].message.model_extra["reasoning_content"] == "Where?"
    assert answer.choices[0].message.content == "There."
    assert cut.choices[0].message.content is None
    assert cut.usage.completion_tokens_details.reasoning_tokens == 2


async def test_deprecated_functions(make_model: MakeModel) -> None:
    said = f'<tool_call>{{"name": "get_weather", "arguments": {ARGUMENTS}}}</tool_call>' * 2
    body = {**CHAT, "functions": [TOOL["function"]], "function_call": "auto"}
    async with saying(make_model(HERMES), said) as (client, worker, _):
        answer = await client.chat.completions.create(**body)
        chunks = [chunk async for chunk in await client.chat.completions.create(**body, stream=True)]
        call = {"name": "get_weather", "arguments": ARGUMENTS}
        messages = [
            *CHAT["messages"],
            {"role": "assistant", "content": None, "function_call": call},
            {"role": "function", "name": "get_weather", "content": "rain"},
        ]
        await client.chat.completions.create(**{**body, "messages": messages})
    (choice,) = answer.choices
    assert (choice.message.function_call.name, choice.message.function_call.arguments) == ("get_weather", ARGUMENTS)
    assert choice.message.tool_calls is None
    assert choice.finish_reason == chunks[-1].choices[0].finish_reason == "function_call"
    deltas = [chunk.choices[0].delta.function_call for chunk in chunks if chunk.choices[0].delta.function_call]
    assert "".join(delta.arguments for delta in deltas) == ARGUMENTS
    prompt = TextCodec(DEMO / "tokenizer.json").decode(list(worker.submits[-1].token_ids))
    assert '"get_weather", "arguments": {"city": "Köln"}' in prompt
    assert "<tool_response>\nrain\n</tool_response>" in prompt


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_a_resumed_stream_repeats_no_delta_and_keeps_its_ids(make_model: MakeModel, choice: str) -> None:
    said = THINKS + f'So: <tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
    body = {**ASKED, "stream": True, "seed": 1, "tool_choice": choice}
    async with (
        saying(make_model(HERMES), said) as (client, _, _),
        httpx.AsyncClient(base_url=str(client.base_url), timeout=20) as raw,
    ):
        whole = await events(raw, body)
        ends = [at for at in range(1, len(whole)) if whole[at - 1][0] != whole[at][0]]  # an id stands for all before it
        for cut in ends:
            rest = await events(raw, body, {"Last-Event-ID": whole[cut - 1][0]})
            assert folded(rest[1:]) == folded(whole[cut:]), cut
    assert len(ends) > 10


def folded(chunks: list[tuple[str, Any]]) -> dict[str, str]:
    """All texts of some chunks, by the field that they belong to."""
    texts: dict[str, str] = {}
    for _, choice in chunks:
        delta = choice["delta"]
        pieces = {name: delta.get(name, "") for name in ("content", "reasoning_content", "reasoning")}
        for call in delta.get("tool_calls", ()):
            at = call["index"]
            pieces |= {f"id of {at}": call.get("id", ""), f"name of {at}": call["function"].get("name", "")}
            pieces[f"arguments of {at}"] = call["function"]["arguments"]
        pieces["finish_reason"] = choice["finish_reason"] or ""
        for name, piece in pieces.items():
            texts[name] = texts.get(name, "") + piece
    return {name: text for name, text in texts.items() if text}


async def events(client: httpx.AsyncClient, body: Any, headers: Any = None) -> list[tuple[str, Any]]:
    """Ids and choices of a streamed answer."""
    found, event_id = [], ""
    async with client.stream("POST", "chat/completions", json=body, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("id: "):
                event_id = line[4:]
            elif line.startswith("data: {"):
                content = json.loads(line[6:])
                assert "error" not in content, content
                found.append((event_id, content["choices"][0]))
    return found


async def test_logprobs_and_ids_come_once(make_model: MakeModel) -> None:
    said = THINKS + f'<tool_call>{{"name": "get_weather", "arguments": {ARGUMENTS}}}</tool_call>'
    async with saying(make_model(HERMES), said) as (client, worker, _):
        ids: list[int] = []
        async for chunk in await client.chat.completions.create(
            **ASKED, stream=True, extra_body={"return_token_ids": True}
        ):
            ids += (chunk.choices[0].model_extra or {}).get("token_ids") or ()
    assert ids == worker.answer


STRICT_BUT_UNKNOWN = {
    "type": "function",
    "function": {"name": "f", "parameters": {"properties": {"x": {"$ref": "#/$defs/missing"}}}},
}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": "x"}, "tools"),
    ({"tools": ["x"]}, "tools.0"),
    ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tools": [TOOL, TOOL]}, "tools.1.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools.0.function.parameters"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
        "tools.0.function.parameters.type",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": []}}}]},
        "tools.0.function.parameters.properties",
    ),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]}, "tools.0.function.strict"),
    ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice.function.name"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "x", "tools": []}}},
        "tool_choice.allowed_tools.mode",
    ),
    (
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
        "tool_choice.allowed_tools.tools",
    ),
    ({"tools": [TOOL], "functions": [TOOL["function"]]}, "functions"),
    ({"functions": [{}]}, "functions.0.name"),
    ({"functions": [TOOL["function"]], "function_call": "required"}, "function_call"),
    ({"functions": [TOOL["function"]], "function_call": {"name": "g"}}, "function_call.name"),
    ({"tools": [STRICT_BUT_UNKNOWN], "tool_choice": "required"}, "tools"),
    ({"function_call": {"name": "g"}}, "function_call"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
]


async def test_wrong_tools_are_refused_by_name(make_model: MakeModel) -> None:
    async with (
        saying(make_model(HERMES), "x") as (client, worker, _),
        httpx.AsyncClient(base_url=str(client.base_url), timeout=20) as raw,
    ):
        for change, param in BAD:
            answer = await raw.post("chat/completions", json={**CHAT, **change})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, param), error
            assert error["message"].startswith(f"{param}: ")
    assert not worker.submits


async def test_tools_are_refused_where_the_template_does_not_show_them(make_model: MakeModel) -> None:
    unknown = HERMES.replace("<tool_call>", "<invoke>").replace("</tool_call>", "</invoke>")
    for template, complaint in ((chat_templates.QWEN3, "does not show tools"), (unknown, "a form that is not known")):
        async with saying(make_model(template), "x") as (client, _, _):
            with pytest.raises(openai.BadRequestError, match=complaint):
                await client.chat.completions.create(**ASKED)
            assert (await client.chat.completions.create(**ASKED, tool_choice="none")).choices[0].message.content == "x"


async def test_allowed_tools_are_all_that_may_be_called(make_model: MakeModel) -> None:
    said = '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>'
    other = {"type": "function", "function": {"name": "other"}}
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "other"}}]}
    async with saying(make_model(HERMES), said) as (client, worker, _):
        choice = {"type": "allowed_tools", "allowed_tools": allowed}
        answer = await client.chat.completions.create(**{**ASKED, "tools": [TOOL, other]}, tool_choice=choice)
    assert answer.choices[0].message.content == '{"name": "get_weather", "arguments": {}}'  # its markers are special
    assert "The weather" not in TextCodec(DEMO / "tokenizer.json").decode(list(worker.submits[0].token_ids))


async def test_each_choice_has_its_calls(make_model: MakeModel) -> None:
    said = f'<tool_call>{{"name": "get_weather", "arguments": {ARGUMENTS}}}</tool_call>'
    async with saying(make_model(HERMES), said) as (client, _, _):
        answer = await client.chat.completions.create(**ASKED, n=2)
        calls: dict[int, str] = {0: "", 1: ""}
        async for chunk in await client.chat.completions.create(**ASKED, n=2, stream=True):
            (choice,) = chunk.choices
            for call in choice.delta.tool_calls or ():
                calls[choice.index] += call.function.arguments
    assert calls == {0: ARGUMENTS, 1: ARGUMENTS}
    ids = [choice.message.tool_calls[0].id for choice in answer.choices]
    assert len(set(ids)) == 2
    assert [choice.finish_reason for choice in answer.choices] == ["tool_calls"] * 2


async def test_a_stop_text_ends_an_answer_before_its_call(make_model: MakeModel) -> None:
    said = f'One. Two.<tool_call>{{"name": "get_weather", "arguments": {ARGUMENTS}}}</tool_call>'
    async with saying(make_model(HERMES), said) as (client, _, _):
        answer = await client.chat.completions.create(**ASKED, stop=" Two")
        inside = await client.chat.completions.create(**ASKED, stop="city")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("One.", "stop")
    assert inside.choices[0].message.tool_calls[0].function.arguments == '{"'


async def test_tokenize_counts_tools(make_model: MakeModel) -> None:
    async with (
        saying(make_model(HERMES), "x") as (client, worker, cluster),
        httpx.AsyncClient(base_url=cluster.http_url, timeout=20) as raw,
    ):
        await client.chat.completions.create(**ASKED)
        answer = await raw.post("/tokenize", json=ASKED)
    assert answer.json()["tokens"] == list(worker.submits[0].token_ids)


BEGIN, CALL, SEPARATOR, END, ALL_END = DEEPSEEK.markers
FAMILIES: dict[str, tuple[str, str, str]] = {  # a template, an answer with two calls, and its content
    "llama": (
        chat_templates.LLAMA_WITH_TOOLS,
        f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}; {{"name": "get_weather", "parameters": {{}}}}',
        "",
    ),
    "deepseek": (
        chat_templates.DEEPSEEK,
        f"I look.{BEGIN}{CALL}get_weather{SEPARATOR}{ARGUMENTS}{END}{CALL}get_weather{SEPARATOR}{{}}{END}{ALL_END}",
        "I look.",
    ),
    "mistral": (
        MISTRAL + "{# [ARGS] #}",
        f"I look.[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]get_weather[ARGS]{{}}",
        "I look.",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
async def test_calls_of_other_families(make_model: MakeModel, family: str) -> None:
    template, said, content = FAMILIES[family]
    async with saying(make_model(template), said) as (client, worker, _):
        answer = await client.chat.completions.create(**ASKED)
        message, _ = await streamed(client, **ASKED)
        required = await client.chat.completions.create(**ASKED, tool_choice="required")
        named = await client.chat.completions.create(**ASKED, tool_choice=NAMED)
    calls = [["get_weather", ARGUMENTS], ["get_weather", "{}"]]
    assert [call[1:] for call in message["tool_calls"]] == calls
    for chat, shown, wanted in ((answer, content, calls), (required, "", calls), (named, "", calls[:1])):
        (choice,) = chat.choices
        assert [[call.function.name, call.function.arguments] for call in choice.message.tool_calls] == wanted
        assert (choice.message.content or "", choice.finish_reason) == (shown, "tool_calls")
    assert (message["content"], message["finish_reason"]) == (content, "tool_calls")
    assert [submit.sampling.HasField("grammar") for submit in worker.submits] == [False, False, True, True]


async def test_deepseek_thinks_where_its_template_opens_it(make_model: MakeModel) -> None:
    body = {**CHAT, "extra_body": {"chat_template_kwargs": {"thinking": True}}}
    async with saying(make_model(chat_templates.DEEPSEEK), "Where?</think>There.") as (client, _, _):
        thought = await client.chat.completions.create(**body)
        plain = await client.chat.completions.create(**CHAT)
    assert thought.choices[0].message.model_extra["reasoning"] == "Where?"
    assert thought.choices[0].message.content == "There."
    assert plain.choices[0].message.content == "Where?There."  # its closing marker is a special token here
    assert plain.usage.completion_tokens_details.reasoning_tokens == 0
