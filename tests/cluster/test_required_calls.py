"""Calls that the real engine is made to write: by the openai client, through a whole cluster."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fake_cluster import FakeCluster
from tests.fake_model import DEMO, MODEL_NAME
from tests.fake_shape import Shape
from tests.forked import Prefork
from tests.router.chat_templates import HERMES

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

DAYS = {"type": "integer", "minimum": 1, "maximum": 9}
CITIES = {"type": "string", "enum": ["Oslo", "Rome"]}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            },
        },
    }
    for name, properties in (("get_weather", {"city": CITIES}), ("get_forecast", {"city": CITIES, "days": DAYS}))
]
ASKED: dict[str, Any] = {
    "model": MODEL_NAME,
    "messages": [{"role": "user", "content": "How is the weather in Rome?"}],
    "tools": TOOLS,
    "max_tokens": 300,
    "extra_body": {"chat_template_kwargs": {"enable_thinking": False}},  # untrained, it would reason to the end
}


@pytest.fixture(scope="module")
def client(prefork: Prefork, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """Of a cluster with the demo model, which has learned nothing of tools, and a template that shows them."""
    directory = tmp_path_factory.mktemp("model")
    shutil.copytree(DEMO, directory, dirs_exist_ok=True)
    Path(directory, "chat_template.jinja").write_text(HERMES)
    engine = {"runner": "torch", "max_num_seqs": 8}
    shape = Shape(prefill=1, model_dir=str(directory), block_size=16, engine=engine)
    with (
        FakeCluster(prefork, shape) as cluster,
        openai.OpenAI(base_url=f"{cluster.http_urls[0]}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.mark.parametrize("seed", range(4))
def test_a_required_call_comes_with_arguments_that_fit(client: openai.OpenAI, seed: int) -> None:
    answer = client.chat.completions.create(
        **ASKED, tool_choice="required", parallel_tool_calls=False, seed=seed, temperature=1.0
    )
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    check(call.function.name, call.function.arguments)


def test_a_named_function_is_called_and_streamed(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "get_forecast"}}
    arguments, names, reason = "", [], None
    for chunk in client.chat.completions.create(
        **ASKED, tool_choice=named, parallel_tool_calls=False, stream=True, temperature=1.0, seed=3
    ):
        (choice,) = chunk.choices
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or ():
            names += [call.function.name] if call.function.name else []
            arguments += call.function.arguments
    assert (names, reason) == (["get_forecast"], "tool_calls")
    check("get_forecast", arguments)


def test_content_has_its_form_behind_the_reasoning(client: openai.OpenAI) -> None:
    schema = {"name": "number", "schema": {"type": "integer", "minimum": 10, "maximum": 99}}
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=ASKED["messages"],
        response_format={"type": "json_schema", "json_schema": schema},
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
        max_tokens=300,
    )
    assert 10 <= int(answer.choices[0].message.content or "") <= 99


def test_a_response_has_a_required_call(client: openai.OpenAI) -> None:
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    asked = {"model": MODEL_NAME, "input": "How is the weather in Rome?", "tools": tools, "max_output_tokens": 300}
    options = {"parallel_tool_calls": False, "temperature": 1.0, "extra_body": {"seed": 5, **ASKED["extra_body"]}}
    whole = client.responses.create(**asked, **options, tool_choice="required")
    (call,) = whole.output
    check(call.name, call.arguments)
    with client.responses.stream(**asked, **options, tool_choice="required") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert [(one.name, one.arguments) for one in final.output] == [(call.name, call.arguments)]


def test_a_deprecated_function_is_called_by_name(client: openai.OpenAI) -> None:
    asked = {name: value for name, value in ASKED.items() if name != "tools"}
    answer = client.chat.completions.create(
        **asked,
        functions=[tool["function"] for tool in TOOLS],
        function_call={"name": "get_weather"},
        temperature=1.0,
        seed=2,
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "function_call"
    check("get_weather", choice.message.function_call.arguments)


def check(name: str, arguments: str) -> None:
    given = json.loads(arguments)
    wanted = {"get_weather": {"city"}, "get_forecast": {"city", "days"}}[name]
    assert set(given) == wanted
    assert given["city"] in CITIES["enum"]
    assert 1 <= given.get("days", 1) <= 9
